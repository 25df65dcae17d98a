"""The one table of MoE models, and shapes of models that are not in it: from a config.json or from four numbers."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import FormatError, InputError, one_of

SEQUENCE_LENGTH = 4096  # tokens a sequence for attention, where nothing says otherwise
DEFAULT_MODEL = "Qwen3-30B-A3B"  # whose experts are priced where no shape is given


def kept_replica_bytes(parameters: int, trained: int, parameter_bytes: int) -> int:
    """Memory of a kept copy of so many parameters, with a gradient in fp32 or wider for each that is trained."""
    return parameters * parameter_bytes + trained * max(4, parameter_bytes)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one MoE layer and of the attention beside it, from the model's published config.json.

    Attributes:
        layers: MoE layers. experts, top_k: of each.
        hidden_size, intermediate_size: of one routed expert, which has gate, up and down projections, or up
            and down alone (`has_gate` False).
        heads, kv_heads, head_dim: attention. With multi-head latent attention, head_dim is the size of a head's queries
            and keys without their rotary part.
        shared_intermediate_size: of all shared experts together, which every rank runs for its own tokens.
        q_rank, kv_rank, rope_dim, value_dim: sizes of multi-head latent attention: of compressed queries (0: they are
            not compressed), of compressed keys and values, of a head's rotary part and values. All 0: plain attention.
        parameter_bytes: of one parameter of an expert, as it is stored and sent: 2 (bf16), or 4 (fp32).
        adapter_rank: of low-rank adapters of all three projections, beside frozen weights; 0: the weights are trained.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    shared_intermediate_size: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    value_dim: int = 0
    adapter_rank: int = 0
    has_gate: bool = True
    parameter_bytes: int = 2

    @property
    def first_width(self) -> int:
        """Columns of the first projection: of gate and up, or of up alone."""
        return (2 if self.has_gate else 1) * self.intermediate_size

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert: its gate, up and down projections, and their adapters."""
        return self.hidden_size * (self.first_width + self.intermediate_size) + self._adapter_parameters

    @property
    def trained_parameters(self) -> int:
        """Parameters of one expert that have a gradient."""
        return self._adapter_parameters or self.expert_parameters

    @property
    def _adapter_parameters(self) -> int:
        """Gate and up are one projection `[2I, H]`."""
        return self.adapter_rank * (2 * self.hidden_size + self.first_width + self.intermediate_size)

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert."""
        return self.parameter_bytes * self.expert_parameters

    @property
    def gradient_bytes(self) -> int:
        """Gradient of one expert; summed in fp32 or wider, so returned in that."""
        return max(4, self.parameter_bytes) * self.trained_parameters

    @property
    def copy_bytes(self) -> int:
        """Memory of one kept replica: 18 * H * I bytes in bf16 without adapters, 24 * H * I in fp32; see
        `kept_replica_bytes`."""
        return kept_replica_bytes(self.expert_parameters, self.trained_parameters, self.parameter_bytes)

    @property
    def migration_bytes(self) -> int:
        """Weights of one expert; fp32 master weights, unless the weights are fp32 themselves, and both Adam moments of
        what is trained."""
        wide = max(4, self.parameter_bytes)
        master = 0 if self.parameter_bytes == wide else wide
        return self.expert_bytes + (master + 2 * wide) * self.trained_parameters

    def assignment_flops(self) -> int:
        """FLOPs of one token in one expert, forward: a multiply and an add per parameter."""
        return 2 * self.expert_parameters

    def update_flops(self) -> int:
        """FLOPs of one token in the gradient of one expert's parameters."""
        return 2 * self.trained_parameters

    def step_flops(self) -> int:
        """FLOPs of one token in one expert, forward and backward."""
        return 2 * self.assignment_flops() + self.update_flops()

    def dense_flops(self, sequence_length: int) -> int:
        """FLOPs of one token outside the routed experts, forward: projections, causal attention, shared experts."""
        value_dim = self.value_dim or self.head_dim
        query_dim = self.head_dim + self.rope_dim
        if self.kv_rank:
            query = (
                self.q_rank * (self.hidden_size + self.heads * query_dim) or self.hidden_size * self.heads * query_dim
            )
            key = self.hidden_size * (self.kv_rank + self.rope_dim)
            key += self.kv_rank * self.heads * (self.head_dim + value_dim)
        else:
            query, key = self.hidden_size * self.heads * query_dim, 2 * self.hidden_size * self.kv_heads * self.head_dim
        parameters = query + key + self.heads * value_dim * self.hidden_size
        parameters += (3 if self.has_gate else 2) * self.hidden_size * self.shared_intermediate_size
        attention = self.heads * (query_dim + value_dim) * sequence_length  # half the sequence, two FLOPs
        return 2 * parameters + attention


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("Qwen3-30B-A3B", 48, 128, 8, 2048, 768, 32, 4, 128),
        ModelShape("Qwen3-235B-A22B", 94, 128, 8, 4096, 1536, 64, 4, 128),
        ModelShape("GLM-4.5-Air", 45, 128, 8, 4096, 1408, 96, 8, 128, 1408),
        ModelShape("DeepSeek-V3", 58, 256, 8, 7168, 2048, 128, 128, 128, 2048, 1536, 512, 64, 128),
        ModelShape("Moonlight-16B-A3B", 26, 64, 6, 2048, 1408, 16, 16, 128, 2816, 0, 512, 64, 128),
        ModelShape("OLMoE", 16, 64, 8, 2048, 1024, 16, 16, 128),
        ModelShape("Mixtral-8x7B", 32, 8, 2, 4096, 14336, 32, 8, 128),
        ModelShape("gpt-oss-120b", 36, 128, 4, 2880, 2880, 64, 8, 64),
        ModelShape("Kimi-K2", 60, 384, 8, 7168, 2048, 64, 64, 128, 2048, 1536, 512, 64, 128),
        ModelShape("gpt-oss-20b", 24, 32, 4, 2880, 2880, 64, 8, 64),
        ModelShape("GLM-4.5", 89, 160, 8, 5120, 1536, 96, 8, 128, 1536),
        ModelShape("Qwen1.5-MoE-A2.7B", 24, 60, 4, 2048, 1408, 16, 16, 128, 5632),
        ModelShape("DeepSeek-V2-Lite", 26, 64, 6, 2048, 1408, 16, 16, 128, 2816, 0, 512, 64, 128),
        ModelShape("Phi-3.5-MoE", 32, 16, 2, 4096, 6400, 32, 8, 128),
        ModelShape("Mixtral-8x22B", 56, 8, 2, 6144, 16384, 48, 8, 128),
    )
}


def find_model(text: str) -> ModelShape:
    """The shape that `text` names: one of MODELS in upper or lower case, a config.json or its folder, or `H,I,E,K`.

    Names as the hub has them are found too: `Qwen/Qwen3-30B-A3B-Instruct-2507` is Qwen3-30B-A3B.
    `H,I,E,K` gets attention of H / 128 heads of 128, with an eighth as many for keys and values.
    """
    if "," in text:
        return shape_of_text(text)
    path = Path(text)
    if text.endswith(".json") or path.is_file():
        return _shape_of_config(path)
    if (path / "config.json").is_file():
        return _shape_of_config(path / "config.json")
    plain = path.name.lower()
    for name in sorted(MODELS, key=len, reverse=True):
        if plain == name.lower() or plain.startswith(f"{name.lower()}-"):
            return MODELS[name]
    return MODELS[one_of("model", text, MODELS, ", the path of a config.json, or H,I,E,K")]


def model_of_routing(layers: int, experts: int, top_k: int | None = None) -> ModelShape:
    """The model that routing of these sizes is most likely of, for prices where none is named.

    Of those that choose `top_k` of `experts`: one with so many layers, else `DEFAULT_MODEL`, else the smallest. Where
    none does so, `DEFAULT_MODEL` with these experts and top-k, under a name that says so.

    top_k: None where only loads are known.
    """
    alike = [s for s in MODELS.values() if s.experts == experts and top_k in (None, s.top_k)]
    if alike:
        return min(alike, key=lambda s: (s.layers != layers, s.name != DEFAULT_MODEL, s.expert_parameters))
    like = MODELS[DEFAULT_MODEL]
    chosen = min(top_k or like.top_k, experts)
    return replace(
        like, name=f"{like.name} with {chosen} of {experts} experts", layers=layers, experts=experts, top_k=chosen
    )


def shape_of_sizes(
    hidden_size: int,
    intermediate_size: int,
    experts: int,
    top_k: int,
    *,
    layers: int = 1,
    name: str = "",
    has_gate: bool = True,
) -> ModelShape:
    """A model of which only the experts are known: attention of H / 128 heads, an eighth for keys and values."""
    heads = max(hidden_size // 128, 1)
    name = name or f"{hidden_size},{intermediate_size},{experts},{top_k}"
    sizes = layers, experts, top_k, hidden_size, intermediate_size, heads, max(heads // 8, 1), 128
    return ModelShape(name, *sizes, has_gate=has_gate)


def shape_of_text(text: str) -> ModelShape:
    """`H,I,E,K` as a model without a name of its own."""
    try:
        hidden_size, intermediate_size, experts, top_k = (int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"shape is {text!r}; it must be H,I,E,K: four integers with commas between them") from None
    if min(hidden_size, intermediate_size, experts, top_k) < 1 or top_k > experts:
        raise InputError(f"shape is {text!r}; H, I, E and K must be positive, and K at most E")
    return shape_of_sizes(hidden_size, intermediate_size, experts, top_k)


def _moe_blocks(config: dict[str, Any]) -> int:
    """Of a model that lists what each block is, as Nemotron-H does; 0 where none of them says that it is an MoE."""
    kinds = config.get("layers_block_type")
    if isinstance(kinds, list):
        return kinds.count("moe")
    pattern = config.get("hybrid_override_pattern")
    return pattern.count("E") if isinstance(pattern, str) else 0


def _read_config(path: Path) -> dict[str, Any]:
    """A config.json, of a model of several kinds of input that of its text part. Raises: FormatError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise FormatError(f"{path}: is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path}: is JSON, but not the object that a config.json is")
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _shape_of_config(path: Path) -> ModelShape:
    """From the config.json that Hugging Face keeps beside a model's weights."""
    config = _read_config(path)

    def size(*names: str, default: int | None = None) -> int:
        value: Any = next((config[name] for name in names if config.get(name) is not None), default)
        if value is None:
            raise FormatError(f"{path}: has none of {', '.join(names)}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise FormatError(f"{path}: {names[0]} is {value!r}, but must be an integer that is not negative")
        return value

    hidden_size, heads = size("hidden_size"), size("num_attention_heads")
    intermediate_size = size("moe_intermediate_size", "intermediate_size")
    if config.get("moe_latent_size"):
        raise FormatError(
            f"{path}: moe_latent_size is {config['moe_latent_size']!r}; experts of another width than the model's are "
            "not priced: give H,I,E,K with that width as H"
        )
    shared = size("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", default=0)
    shared = shared or size("n_shared_experts", "num_shared_experts", default=0) * intermediate_size
    kv_rank = size("kv_lora_rank", default=0)
    shape = ModelShape(
        name=str(config.get("_name_or_path") or path.resolve().parent.name),
        layers=_moe_blocks(config) or size("num_hidden_layers") - size("first_k_dense_replace", default=0),
        experts=size("num_experts", "n_routed_experts", "num_local_experts"),
        top_k=size("num_experts_per_tok", "moe_topk"),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        heads=heads,
        kv_heads=size("num_key_value_heads", default=heads),
        head_dim=size("qk_nope_head_dim") if kv_rank else size("head_dim", default=hidden_size // max(heads, 1)),
        shared_intermediate_size=shared,
        q_rank=size("q_lora_rank", default=0) if kv_rank else 0,
        kv_rank=kv_rank,
        rope_dim=size("qk_rope_head_dim") if kv_rank else 0,
        value_dim=size("v_head_dim") if kv_rank else 0,
        has_gate=config.get("mlp_hidden_act") != "relu2",
    )
    if min(shape.layers, shape.experts, shape.top_k, hidden_size, intermediate_size) < 1:
        raise FormatError(f"{path}: a size that must be positive is not: {shape}")
    if shape.top_k > shape.experts:
        raise FormatError(f"{path}: chooses {shape.top_k} of {shape.experts} experts")
    return shape
