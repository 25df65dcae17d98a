"""mbridge's maps of names and weights take what we give by Megatron's names, and give what we take."""

import pytest

pytest.importorskip("megatron", reason="needs megatron-core")
pytest.importorskip("mbridge", reason="needs mbridge")
import torch
from mbridge import AutoBridge
from mbridge.core.parallel_states import ParallelStates
from megatron_ranks import exported, loaded
from ranks import Ranks
from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_experts_per_tok": 2}
NO_AUX = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
# names of a family's experts in its checkpoints: gate, up, down
OWN = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj")
MIXTRAL = ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2")
FAMILIES = [
    (Qwen3MoeConfig(num_experts=8, moe_intermediate_size=24, **SIZES), OWN),
    (Qwen2MoeConfig(num_experts=8, moe_intermediate_size=24, **SIZES), OWN),
    (MixtralConfig(num_local_experts=8, intermediate_size=24, **SIZES), MIXTRAL),
]


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2, daemon=False)
    yield group
    group.close()


@pytest.mark.parametrize(("config", "names"), FAMILIES, ids=[config.model_type for config, _ in FAMILIES])
def test_mbridge_maps_our_names_both_ways(config, names, ranks):
    """A checkpoint's experts, loaded by them where a plan has moved the experts, are exported as they were."""
    bridge = AutoBridge.from_config(config, dtype=torch.float32, parallel_states=ParallelStates())
    shapes = [(24, 32), (24, 32), (32, 24)]
    checkpoint = {
        f"model.layers.{layer}.{name.format(expert)}.weight": torch.randn(shape)
        for layer in range(2)
        for expert in range(8)
        for name, shape in zip(names, shapes, strict=True)
    }

    def weight_of(name: str) -> torch.Tensor:
        parts = [checkpoint[of_family] for of_family in bridge._weight_name_mapping_mcore_to_hf(name)]
        return bridge._weight_to_mcore_format(name, parts)

    stems = (f"decoder.layers.{layer}.mlp.experts.linear_fc{i}.weight" for layer in range(2) for i in (1, 2))
    weights = {name: weight_of(name) for stem in stems for name in (f"{stem}{expert}" for expert in range(8))}
    for got in ranks.run(loaded, weights, NO_AUX):
        found = {}
        for name, weight in got.items():
            found.update(zip(*bridge._weight_to_hf_format(name, weight), strict=True))
        assert found.keys() == checkpoint.keys()
        assert all(found[name].equal(weight) for name, weight in checkpoint.items())


def test_mbridge_takes_every_other_name_of_the_moe_layer(ranks):
    bridge = AutoBridge.from_config(FAMILIES[1][0], dtype=torch.float32, parallel_states=ParallelStates())
    weights, _ = ranks.run(exported, 1, {**NO_AUX, "moe_shared_expert_intermediate_size": 16})[0]
    of_layer = [name for name in weights if ".mlp." in name and ".experts." not in name]
    found = {theirs for name in of_layer for theirs in bridge._weight_name_mapping_mcore_to_hf(name)}
    kinds = {name.partition(".mlp.")[2] for name in found}
    assert kinds == {"gate.weight", *(f"shared_expert.{part}_proj.weight" for part in ("gate", "up", "down"))}
