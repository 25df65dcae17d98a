"""Families of transformers under plans that move and copy experts: two ranks have the gradients of one process.

A sample of them; all with RELIBRA_FAMILIES=all, which is `make test-families`.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
import transformers
from hf_all_families import FAMILIES, OF_5_24, families_table, tiny_model
from hf_under_plan import LOOKS_BOTH_WAYS, compare, kernels_against_eager, recorded_and_replayed, replayed_choices
from ranks import Ranks
from versions import TRANSFORMERS

from relibra_kernels.integrations.transformers import expert_form, replace_moe_blocks
from relibra_kernels.integrations.transformers.moe_layers import moe_layers
from relibra_kernels.planner.errors import InputError

NEWER = ("muse_spark",) if TRANSFORMERS >= (5, 23) else ()  # 5.17 has none
SAMPLE = ("mixtral", "deepseek_v3", "gpt_oss", "afmoe", "phimoe", "nemotron_h")
KNOWN = {
    "muse_spark": "its experts are normed one by one before they are summed, which a rank does not do",
    "zaya": "its router may choose to skip the experts, which a plan has no place for",
}
chosen = FAMILIES if os.environ.get("RELIBRA_FAMILIES") == "all" else SAMPLE


@pytest.mark.skipif(TRANSFORMERS < (5, 23), reason="the table is of transformers 5.23 and 5.24")
def test_the_table_of_families_is_what_the_code_does():
    """Every family of transformers' experts interface is in it, and says yes where the tests here run it."""
    later = OF_5_24 if TRANSFORMERS < (5, 24) else ()
    said = {family: cells for family, cells in families_table().items() if family not in later}
    models = Path(transformers.__file__).parent / "models"
    interface = {
        path.parent.name for path in models.glob("*/modeling_*.py") if "@use_experts_implementation" in path.read_text()
    }
    outside = {family for family, (kernels, *_) in said.items() if "do not use transformers' experts" in kernels}
    assert said.keys() - outside == interface
    assert {family for family, cells in said.items() if cells[3].startswith("yes")} == {
        family for family in FAMILIES if family not in KNOWN and family not in LOOKS_BOTH_WAYS
    }
    assert {family for family, cells in said.items() if cells[3].startswith("with every token")} == {*LOOKS_BOTH_WAYS}
    for family, (kernels, *_) in said.items():
        if family in FAMILIES:
            assert kernels == "yes" and all(cell.startswith("yes") for cell in said[family][1:3])
            with torch.device("meta"):
                experts = [layer.experts for layer in moe_layers(tiny_model(family))]
            assert experts and all(expert_form(module) for module in experts)


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2)
    yield group
    group.close()


@pytest.mark.parametrize("family", [family for family in chosen if family not in KNOWN])
def test_two_ranks_under_plans_train_as_one_process(family, ranks):
    assert compare(family, ranks) == ""


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_familys_own_auxiliary_loss_is_as_on_one_process(family, ranks):
    """It reads the routers of every token; so that every token must be recorded."""
    assert compare(family, ranks, output_router_logits=True) == ""


@pytest.mark.parametrize("family", sorted({*chosen, "deepseek_v4", "gemma4", *NEWER}))
def test_what_was_recorded_is_replayed(family):
    error, sequences, unknown = recorded_and_replayed(family)
    assert error <= 1e-6
    assert (sequences, unknown) == (8, 0)


@pytest.mark.parametrize("family", ["deepseek_v4", "gemma4", "hy_v4"])
def test_the_experts_get_what_is_replayed(family):
    """In layers whose router reads a table of token ids, too."""
    np.testing.assert_array_equal(*replayed_choices(family))


@pytest.mark.skipif(not NEWER, reason="transformers has no Muse Spark")
def test_a_norm_after_every_expert_is_refused_over_ranks():
    """Before anything is changed; on one process it is computed."""
    model = tiny_model("muse_spark")
    with pytest.raises(InputError, match="has_post_expert_norm of MuseSparkExperts is True; over several ranks"):
        replace_moe_blocks(model)
    assert type(moe_layers(model)[0].experts).__name__ == "MuseSparkExperts"


@pytest.mark.parametrize("family", ["deepseek_v4", "hy_v4", "diffusion_gemma", "glm5_next"])
def test_other_activations_are_exact_under_replay(family):
    assert kernels_against_eager(family) <= 1e-12


@pytest.mark.parametrize("family", [*NEWER, "nemotron_h"])
def test_what_rounds_to_float32_within_is_as_exact(family):
    """Its norm, or its router."""
    assert kernels_against_eager(family) <= 2e-6
