"""PEFT adapters of experts under plans: cut, moved, replicated and saved with their experts."""

import pytest

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("peft", reason="needs peft")
from lora_under_plan import alone, together, traces_of
from ranks import Ranks
from tolerance import assert_close


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2)
    yield group
    group.close()


@pytest.mark.parametrize("keep", [False, True], ids=["fetched", "kept"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_adapters_train_under_plans_as_in_one_process(family, keep, ranks, tmp_path):
    traces = traces_of(2, 8, 2)
    got = ranks.run(together, family, traces, keep, str(tmp_path / "checkpoint"))[0]
    for step, expected in enumerate(alone(family, traces)):
        assert got[step].keys() == expected.keys()
        assert sum("experts" in name for name in expected) == 8  # A and B of two parameters of two layers
        for name, gradient in expected.items():
            assert_close(got[step][name], gradient, 1e-5, f"step {step}, {name}")
