"""Adapters of experts under plans: cut, moved, replicated and saved with their experts; PEFT's, and our own."""

import pytest

pytest.importorskip("transformers", reason="needs transformers")
from lora_under_plan import alone, together, traces_of
from ranks import Ranks
from tolerance import assert_close


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2)
    yield group
    group.close()


@pytest.mark.parametrize("keep", [False, True], ids=["fetched", "kept"])
@pytest.mark.parametrize(
    ("how", "family"),
    [
        ("peft", "qwen3_moe"),
        ("peft", "gpt_oss"),
        ("peft after", "mixtral"),
        ("peft after", "gpt_oss"),
        ("own", "mixtral"),
    ],
)
def test_adapters_train_under_plans_as_in_one_process(how, family, keep, ranks, tmp_path):
    """And a replica sends back the factors' gradients alone."""
    if how != "own":
        pytest.importorskip("peft", reason="needs peft")
    traces = traces_of(2, 8, 2)
    got = ranks.run(together, how, family, traces, keep, str(tmp_path / "checkpoint"))[0]
    for step, alone_ in enumerate(alone(how, family, traces)):
        expected = {
            name.removeprefix("base_model.model.") if how == "peft after" else name: g for name, g in alone_.items()
        }
        assert got[step].keys() == expected.keys()
        assert sum("experts" in name for name in expected) == 8  # A and B of two parameters of two layers
        for name, gradient in expected.items():
            assert_close(got[step][name], gradient, 1e-5, f"step {step}, {name}")
