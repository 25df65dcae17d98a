"""A tiny model of every MoE family of transformers: its own config class, with every size cut down."""

import importlib
import itertools
import re
from pathlib import Path

import torch
from torch import nn
from versions import TRANSFORMERS

VOCABULARY = 64
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_LATENT = {"num_key_value_heads": 4}  # DeepSeek's attention
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
# family -> (model class, options beyond the sizes)
FAMILIES: dict[str, tuple[str, dict]] = {
    "afmoe": ("AfmoeForCausalLM", {"num_dense_layers": 1}),
    "aria": ("AriaTextForCausalLM", {}),
    "axk1": ("AXK1ForCausalLM", _LATENT),
    "axk2": ("AXK2ForCausalLM", _LATENT),
    "bailing_hybrid": ("BailingHybridForCausalLM", {}),
    "beam": ("BeamForCausalLM", {"mlp_layer_types": ["dense", "sparse"]}),
    "cohere2_moe": ("Cohere2MoeForCausalLM", {}),
    "deepseek_ocr2": ("DeepseekOcr2TextModel", {"mlp_layer_types": ["dense", "sparse"]}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**_LATENT, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _LATENT),
    "deepseek_v32": ("DeepseekV32ForCausalLM", _LATENT),
    "deepseek_v4": ("DeepseekV4ForCausalLM", {"mlp_layer_types": ["hash_moe", "moe"]}),
    "diffusion_gemma": ("DiffusionGemmaEncoderTextModel", {}),
    "dots1": ("Dots1ForCausalLM", {"n_shared_experts": 1}),
    "dots3_note": ("Dots3NoteForCausalLM", _LATENT),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {}),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeTextModel",
        {"moe_intermediate_size": [24, 12], "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
    ),
    "exaone_moe": ("ExaoneMoeForCausalLM", {}),
    "flex_olmo": ("FlexOlmoForCausalLM", {}),
    "flint": ("FlintForCausalLM", {"mlp_only_layers": [0]}),
    "gemma4": ("Gemma4ForCausalLM", {"enable_moe_block": True, "vocab_size_per_layer_input": VOCABULARY}),
    "glm4_moe": ("Glm4MoeForCausalLM", {}),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", _LATENT),
    "glm5_next": (
        "Glm5NextTextModel",
        {
            **_LATENT,
            "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["linear_attention", "indexed_attention"],
            "qk_rope_head_dim": 0,
            "index_kpool": 4,
            "linear_head_dim": 8,
            "linear_num_heads": 2,
        },
    ),
    "glm4v_moe": ("Glm4vMoeTextModel", {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", _LATENT),
    "gpt_oss": ("GptOssForCausalLM", {}),
    "granitemoe": ("GraniteMoeForCausalLM", {}),
    "granitemoe_swa": ("GraniteMoeSWAForCausalLM", {}),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", {"mamba_n_heads": 8, "mamba_d_head": 8}),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {}),
    "hy_v3": ("HYV3ForCausalLM", {}),
    "hy_v4": ("HYV4ForCausalLM", {}),
    "inkling": ("InklingForCausalLM", {}),
    "jamba": ("JambaForCausalLM", {}),
    "kimi_linear": ("KimiLinearForCausalLM", _LATENT),
    "kolibri1": ("Kolibri1ForCausalLM", {}),
    "laguna": ("LagunaForCausalLM", {}),
    "lfm2_moe": ("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "mellum": ("MellumForCausalLM", {}),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", {}),
    "minimax": ("MiniMaxForCausalLM", {}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {}),
    "minimax_m3_vl": ("MiniMaxM3VLForCausalLM", {}),
    "mistral4": (
        "Mistral4ForCausalLM",
        {**_LATENT, "rope_parameters": {**_ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}},
    ),
    "mistral_large4": ("MistralLarge4TextModel", _LATENT),
    "mixtral": ("MixtralForCausalLM", {}),
    "muse_spark": ("MuseSparkTextModel", {"moe_hidden_size": 16, "mlp_layer_types": ["dense", "sparse"]}),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "moe_shared_expert_intermediate_size": 24,
            "moe_latent_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 8,
        },
    ),
    "olmoe": ("OlmoeForCausalLM", {}),
    "openai_privacy_filter": ("OpenAIPrivacyFilterForTokenClassification", {}),
    "phimoe": ("PhimoeForCausalLM", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "qwen3_next": ("Qwen3NextForCausalLM", {}),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinkerTextModel", {}),
    "qwen3_vl_moe": ("Qwen3VLMoeTextModel", {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}),
    "qwen4_exp": ("Qwen4ExpForCausalLM", {}),
    "solar_open": ("SolarOpenForCausalLM", {}),
    "unlimited_ocr": ("UnlimitedOcrTextModel", _LATENT),
    "zaya": ("ZayaForCausalLM", {"num_experts_per_tok": 1}),
}

OF_5_24 = ("hy_v4_vl", "inkling2_loop", "lara_mini")  # of the table, and in no older transformers
if TRANSFORMERS >= (5, 24):
    FAMILIES["hy_v4_vl"] = ("HYV4VLTextModel", {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}})
    FAMILIES["lara_mini"] = ("LaraMiniForCausalLM", {})


def tiny_config(kind: type, **options):
    """A config of this class with every size that it has cut down, also in the configs within it."""
    whole = kind()
    within = {name: tiny_config(type(getattr(whole, name))) for name in getattr(kind, "sub_configs", {})}
    if "text_config" in within:
        within["text_config"] = tiny_config(type(whole.text_config), **options)
        options = {}
    known = set(dir(whole)) | set(vars(whole))
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    return kind(**{**sizes, **within, **options})


def tiny_model(family: str, **more) -> nn.Module:
    """Random weights large enough that routing differs between tokens."""
    name, options = FAMILIES[family]
    kind = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    how = {"experts_implementation": "eager", "attn_implementation": "eager"}
    torch.manual_seed(0)
    return kind._from_config(tiny_config(kind.config_class, **{**options, **more}), **how)


def families_table() -> dict[str, list[str]]:
    """Family -> what docs/huggingface.md says of it: kernels, record, replay, under a plan."""
    page = Path(__file__).parents[2].joinpath("docs", "huggingface.md").read_text()
    found = {}
    rows = page.partition("| families | kernels | record | replay | under a plan |\n")[2].splitlines()[1:]
    for row in itertools.takewhile(lambda line: line.startswith("|"), rows):
        families, *said = (cell.strip() for cell in row.strip("|").split("|"))
        for family in re.findall(r"[a-z]\w*", re.sub(r"\(.*?\)", "", families)):
            assert family not in found, f"{family} is twice in the table"
            found[family] = said
    return found
