"""What the MoE layers of a Hugging Face model are, and which tokens a forward was fed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...nn import ReplicatedExperts
from ...parallel import checks
from ...planner import RoutingTrace
from ...planner.errors import InputError, ShapeError


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer: the experts, the router beside them, and the number of the decoder layer they are in."""

    name: str
    layer_id: int
    experts: nn.Module
    router: nn.Module

    @property
    def num_experts(self) -> int:
        """Of the whole layer: `experts.num_experts` counts those of this rank under expert parallelism."""
        weight: Any = self.router.weight
        return weight.shape[0]

    @property
    def top_k(self) -> int:
        top_k: Any = self.router.top_k
        return top_k


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """The MoE layers of a model in order. Raises: InputError where it has none, or experts without a router."""
    modules = dict(model.named_modules())
    layers: list[MoeLayer] = []
    for name, experts in modules.items():
        if not (
            isinstance(experts, ReplicatedExperts) or (hasattr(experts, "has_gate") and hasattr(experts, "config"))
        ):
            continue
        block = modules[name.rpartition(".")[0]]
        router = next((getattr(block, key) for key in ("gate", "router") if hasattr(block, key)), None)
        if router is None or not hasattr(router, "top_k") or not hasattr(router, "weight"):
            raise InputError(f"{name} ({type(experts).__name__}) has no router as `gate` or `router` beside it")
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.)", name)
        layers.append(MoeLayer(name, int(numbers[-1]) if numbers else len(layers), experts, router))
    if not layers:
        raise InputError(
            f"model is a {type(model).__name__} without experts that transformers or we compute; if another library "
            "replaced them (Liger does with swiglu=True), switch that off"
        )
    return layers


def check_trace(trace: RoutingTrace, layers: list[MoeLayer]) -> None:
    """Refuse a trace of another model."""
    first = layers[0]
    checks.check_trace(trace, len(layers), first.top_k, first.num_experts, [layer.layer_id for layer in layers])


@dataclass(frozen=True)
class Fed:
    """The tokens of one forward of a model.

    token_ids: int64 [B, S], or None where embeddings were fed
    real:      bool [B, S]; False is padding
    cached:    tokens in the cache before them; None without a cache
    """

    token_ids: np.ndarray | None
    real: np.ndarray
    cached: int | None


def fed_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Fed:
    """From the arguments of a model's forward. Waits for the device once."""
    ids: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
    shaped = ids if ids is not None else kwargs.get("inputs_embeds")
    if shaped is None or shaped.ndim < 2:
        raise ShapeError("the model's forward got neither input_ids [B, S] nor inputs_embeds [B, S, H]")
    mask: Tensor | None = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    real = np.ones(shaped.shape[:2], bool)
    if mask is not None and mask.ndim == 2:  # it covers the cache too, so the tokens fed are its end
        real = mask[:, -shaped.shape[1] :].bool().numpy(force=True)
    cache = kwargs.get("past_key_values")
    cached = None if cache is None else int(cache.get_seq_length())
    return Fed(None if ids is None else ids.numpy(force=True), real, cached)
