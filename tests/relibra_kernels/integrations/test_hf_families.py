"""Families of transformers under plans that move and copy experts: two ranks have the gradients of one process.

A sample of them; all with RELIBRA_FAMILIES=all, which is `make test-families`.
"""

import os

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs transformers")
from hf_all_families import FAMILIES
from hf_under_plan import compare, kernels_against_eager, recorded_and_replayed, replayed_choices
from ranks import Ranks

SAMPLE = ("mixtral", "deepseek_v3", "gpt_oss", "afmoe", "phimoe")
KNOWN = {
    "zaya": "its router may choose to skip the experts, which a plan has no place for",
}
chosen = FAMILIES if os.environ.get("RELIBRA_FAMILIES") == "all" else SAMPLE


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2)
    yield group
    group.close()


@pytest.mark.parametrize("family", [family for family in chosen if family not in KNOWN])
def test_two_ranks_under_plans_train_as_one_process(family, ranks):
    assert compare(family, ranks) == ""


@pytest.mark.parametrize("family", sorted({*chosen, "deepseek_v4", "gemma4"}))
def test_what_was_recorded_is_replayed(family):
    error, sequences, unknown = recorded_and_replayed(family)
    assert error <= 1e-6
    assert (sequences, unknown) == (8, 0)


@pytest.mark.parametrize("family", ["deepseek_v4", "gemma4", "hy_v4"])
def test_the_experts_get_what_is_replayed(family):
    """In layers whose router reads a table of token ids, too."""
    np.testing.assert_array_equal(*replayed_choices(family))


@pytest.mark.parametrize("family", ["deepseek_v4", "hy_v4", "diffusion_gemma"])
def test_other_activations_are_exact_under_replay(family):
    assert kernels_against_eager(family) <= 1e-12
