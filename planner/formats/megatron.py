"""Megatron-LM: `RouterReplay` recordings and the JSON lines of its router trace.

`RouterReplay` keeps one [T, K] a router, tokens as they were fed. A line of the trace is {"step", "layer", "rank",
"num_tokens", "topk", "top_indices"} with top_indices [num_tokens][topk]. Both see every token, the last ones too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import FormatError, InputError, ShapeError
from ..trace import RoutingTrace
from .sequences import trace_of_sequences
from .trainers import SIGNED


def from_megatron(
    recorded: Sequence[np.ndarray],
    num_experts: int,
    *,
    sequence_lengths: Sequence[int] | None = None,
    moe_layer_ids: Sequence[int] | None = None,
) -> RoutingTrace:
    """A trace of what the routers of one rank recorded, [T, K] each, in layer order.

    sequence_lengths: of the sequences that the T tokens are; None: one sequence
    moe_layer_ids:    the layer number of each router; None: 0 to L - 1
    """
    routers = [np.asarray(indices) for indices in recorded]
    if not routers or any(indices.ndim != 2 or indices.shape != routers[0].shape for indices in routers):
        raise ShapeError(
            f"recorded has the shapes {[indices.shape for indices in routers][:8]}, but must be [tokens, k] a router"
        )
    lengths = [len(routers[0])] if sequence_lengths is None else [int(n) for n in sequence_lengths]
    if min(lengths, default=-1) < 0 or sum(lengths) != len(routers[0]):
        raise InputError(f"sequence_lengths sum to {sum(lengths)}, but {len(routers[0])} tokens were recorded")
    ids_TLK = np.stack(routers, 1)
    trace = trace_of_sequences(
        np.split(ids_TLK, np.cumsum(lengths)[:-1]),
        num_experts,
        last_token="in place",
        dtypes=(*SIGNED, np.uint8, np.uint16),
        moe_layer_ids=range(len(routers)),
        what="recorded",
    )
    if moe_layer_ids is None:
        return trace
    return RoutingTrace(trace.expert_ids, trace.offsets, num_experts, tuple(moe_layer_ids))


def from_megatron_lines(lines: Sequence[Mapping[str, Any]], num_experts: int) -> RoutingTrace:
    """A trace of a router trace's lines: every (step, rank) is a sequence, by step, then rank."""
    parts: dict[tuple[int, int], dict[int, np.ndarray]] = {}
    for number, line in enumerate(lines, 1):
        missing = [key for key in ("step", "layer", "rank", "num_tokens", "topk", "top_indices") if key not in line]
        if missing:
            raise FormatError(f"line {number} has no {missing[0]!r}, only {sorted(line)}")
        try:
            indices = np.asarray(line["top_indices"], dtype=np.int32).reshape(-1, int(line["topk"]))
        except (ValueError, TypeError, OverflowError) as error:
            raise FormatError(f"top_indices of line {number} are no [tokens, topk] of integers: {error}") from None
        if len(indices) != line["num_tokens"]:
            raise InputError(
                f"line {number} has {len(indices)} tokens in top_indices, but num_tokens {line['num_tokens']}"
            )
        layers = parts.setdefault((int(line["step"]), int(line["rank"])), {})
        if layers.setdefault(int(line["layer"]), indices) is not indices:
            raise InputError(f"line {number} repeats layer {line['layer']} of step {line['step']}, rank {line['rank']}")
    if not parts:
        raise FormatError("there is no line, but there must be at least one")
    layer_ids = sorted({layer for layers in parts.values() for layer in layers})
    sequences = []
    for (step, rank), layers in sorted(parts.items()):
        shapes = {indices.shape for indices in layers.values()}
        if sorted(layers) != layer_ids or len(shapes) > 1:
            raise InputError(
                f"step {step}, rank {rank} has layers {sorted(layers)} with shapes {sorted(shapes)}, but every step "
                f"and rank must have layers {layer_ids} with equally many tokens"
            )
        sequences.append(np.stack([layers[layer] for layer in layer_ids], 1))
    lengths = [len(rows) for rows in sequences]
    by_router = list(np.concatenate(sequences).swapaxes(0, 1))
    return from_megatron(by_router, num_experts, sequence_lengths=lengths, moe_layer_ids=layer_ids)
