"""Tiny random Hugging Face MoE models, one a family, and what tests ask of them."""

import numpy as np
import torch
import transformers

from relibra_kernels.planner import RoutingTrace

VOCABULARY = 64
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_MOE = {"intermediate_size": 48, "moe_intermediate_size": 24}
_LATENT = {  # DeepSeek's attention
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 4,
    "topk_group": 2,
}
# family -> (name of its config and model classes, options, layers with experts)
FAMILIES = {
    "qwen2_moe": ("Qwen2Moe", {**_MOE, "num_experts": 8, "shared_expert_intermediate_size": 24}, (0, 1, 2)),
    "qwen3_moe": ("Qwen3Moe", {**_MOE, "num_experts": 8, "head_dim": 8, "mlp_only_layers": [1]}, (0, 2)),
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 8}, (0, 1, 2)),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 8}, (0, 1, 2)),
    "deepseek_v2": ("DeepseekV2", {**_MOE, **_LATENT, "topk_method": "group_limited_greedy"}, (1, 2)),
    "deepseek_v3": ("DeepseekV3", {**_MOE, **_LATENT, "norm_topk_prob": True}, (1, 2)),
    "glm4_moe": (
        "Glm4Moe",
        {
            **_MOE,
            "head_dim": 8,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        (1, 2),
    ),
    "gpt_oss": ("GptOss", {"intermediate_size": 24, "num_local_experts": 8, "head_dim": 8}, (0, 1, 2)),
}


def checkpoint_activations(model: torch.nn.Module, use_reentrant: bool) -> None:
    """By the name that transformers has for it; the older one warns in newer versions."""
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)({"use_reentrant": use_reentrant})


def make_model(family: str, **options: object) -> torch.nn.Module:
    """Random weights large enough that clamps clamp and routing differs between tokens."""
    name, of_family, _ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        **{**_COMMON, **of_family, "experts_implementation": "eager", "attn_implementation": "eager", **options}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model


def make_tokens(sequences: int = 3, length: int = 11, seed: int = 1) -> torch.Tensor:
    """int64 [sequences, length] without special tokens."""
    return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def other_trace(lengths, seed=0, layers=(0, 2), experts=8, top_k=2):
    """Routing that the model would hardly choose."""
    ids = np.random.default_rng(seed).random((sum(lengths), len(layers), experts)).argsort(-1)[..., :top_k]
    return RoutingTrace(ids.astype(np.int8), np.cumsum([0, *lengths]), experts, layers)


def loss_of(model, tokens):
    return model(tokens, labels=tokens, use_cache=False).loss


def logits_and_gradients(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of the next-token loss, of every parameter."""
    model.zero_grad()
    logits = model(tokens, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return logits.detach(), gradients


def experts_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Whatever has stacked expert weights, in layer order."""
    return [module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "is_transposed")]
