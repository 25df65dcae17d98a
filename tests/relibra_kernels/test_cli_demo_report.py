"""What the demo concludes from its times: nothing, where they cannot be told apart."""

import pytest

from relibra_kernels.cli.demo.report import NAMES, table


def summary(planned_quartiles, rounds=3):
    found = {"speedup": 1.3, "recovered": 0.9, "repeats": 3, "rounds": rounds, "plan_seconds": 0.02}
    found |= {f"parity_{what}": 1e-7 for what in ("loss", "grad", "parameters")}
    kinds = ("max_mean", "max_mean_worst", "s", "replicas", "experts_moved")
    sizes = ("token_bytes_per_step", "replica_bytes_per_step", "migration_bytes_per_step")
    for name in NAMES:
        found |= {f"{name}_{kind}": 1.0 for kind in (*kinds, *sizes)}
        found[f"{name}_s_quartiles"] = [2.2, 2.4]
    return found | {"planned_s_quartiles": planned_quartiles}


@pytest.mark.parametrize(("planned", "noisy"), [([1.7, 1.8], False), ([1.7, 2.3], True), ([2.1, 2.6], True)])
def test_a_noisy_run_says_so_and_claims_nothing(planned, noisy):
    text = " ".join(table(summary(planned)).split())
    assert ("too noisy to say which is faster" in text) == noisy
    assert ("1.30x as fast" in text) != noisy


def test_a_run_that_the_time_limit_cut_short_says_so():
    """One round has no spread: its quartiles never overlap, and say nothing."""
    text = " ".join(table(summary([1.7, 1.7], rounds=1)).split())
    assert "too few timed rounds (1)" in text and "1.30x as fast" not in text
    assert "1 interleaved rounds of 3, which the time limit ended" in text
