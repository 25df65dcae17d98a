"""Tiny models of families whose routers are unlike the others: another name, other sizes, another way to choose."""

import torch
import transformers

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "attn_implementation": "eager",
}
# family -> (config class, model class, options, MoE layers, K, choices)
RARE = {
    "afmoe": ("AfmoeConfig", "AfmoeForCausalLM", {"num_dense_layers": 1, "num_shared_experts": 1}, (1, 2), 2, 8),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM", {"moe_topk": 2}, (0, 1, 2), 2, 8),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", {"input_jitter_noise": 0.0}, (0, 1, 2), 2, 8),
    "zaya": ("ZayaConfig", "ZayaForCausalLM", {"num_experts_per_tok": 1, "router_hidden_size": 16}, None, 1, 9),
    "inkling": ("InklingTextConfig", "InklingForCausalLM", {"n_routed_experts": 8, "n_shared_experts": 1}, None, 2, 8),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeTextConfig",
        "Ernie4_5_VLMoeTextModel",
        {"moe_k": 2, "moe_num_experts": 8, "moe_intermediate_size": [24, 24], "moe_num_shared_experts": 1,
         "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        None,
        2,
        8,
    ),
}  # fmt: skip


def make_rare(family: str) -> torch.nn.Module:
    config, model, options, *_ = RARE[family]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**{**_SIZES, **options}))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.normal_(std=0.2)
    return made.eval()
