"""Megatron-LM: `RouterReplay` recordings and the JSON lines of its router trace.

`RouterReplay` keeps one [T, K] a router, tokens as they were fed. A line of the trace is {"step", "layer", "rank",
"num_tokens", "topk", "top_indices"} with top_indices [num_tokens][topk]. Both see every token, the last ones too. Lines
whose "block" is "mtp" are of routers that predict later tokens: their layers are none of the model's.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import FormatError, InputError, ShapeError
from ..trace import RoutingTrace
from .parts import array_of
from .sequences import Holes, trace_of_sequences, whole


def from_megatron(
    recorded: Sequence[np.ndarray],
    num_experts: int,
    *,
    sequence_lengths: Sequence[int] | None = None,
    moe_layer_ids: Sequence[int] | None = None,
    holes: Holes = "refuse",
) -> RoutingTrace:
    """A trace of what the routers of one rank recorded, [T, K] each, in layer order.

    sequence_lengths: of the sequences that the T tokens are; None: one sequence
    moe_layer_ids:    the layer number of each router; None: 0 to L - 1
    holes:            of a token without routing (-1, or zeros with K > 1) in any layer: "refuse", or keep it "unknown"
    """
    if not isinstance(recorded, Iterable):
        raise ShapeError(f"recorded is {recorded!r}, but must be [tokens, k] a router")
    routers = [array_of(indices, f"recorded of router {i}") for i, indices in enumerate(recorded)]
    if not routers or any(indices.ndim != 2 or indices.shape != routers[0].shape for indices in routers):
        raise ShapeError(
            f"recorded has the shapes {[indices.shape for indices in routers][:8]}, but must be [tokens, k] a router"
        )
    try:
        lengths = [len(routers[0])] if sequence_lengths is None else [whole(n) for n in sequence_lengths]
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"sequence_lengths is {sequence_lengths!r}, but must be integers") from None
    if min(lengths, default=-1) < 0 or sum(lengths) != len(routers[0]):
        raise InputError(f"sequence_lengths sum to {sum(lengths)}, but {len(routers[0])} tokens were recorded")
    ids_TLK = np.stack(routers, 1)
    trace = trace_of_sequences(
        np.split(ids_TLK, np.cumsum(lengths)[:-1]),
        num_experts,
        last_token="in place",
        num_tokens=lengths,
        moe_layer_ids=range(len(routers)),
        what="recorded",
        holes=holes,
    )
    if moe_layer_ids is None:
        return trace
    return RoutingTrace(trace.compact_ids, trace.offsets, num_experts, moe_layer_ids, unknown=trace.reasons)


def from_megatron_lines(
    lines: Iterable[Mapping[str, Any]], num_experts: int, *, holes: Holes = "refuse"
) -> RoutingTrace:
    """A trace of a router trace's lines: every (step, rank) is a sequence, by step, then rank.

    Lines of MTP routers are left out, and `trace.report` says so.
    """
    parts: dict[tuple[int, int], dict[int, np.ndarray]] = {}
    of_mtp = 0
    if not isinstance(lines, Iterable):
        raise FormatError(f"lines is {lines!r}, but must be the objects of a router trace")
    for number, line in enumerate(lines, 1):
        if not isinstance(line, Mapping):
            raise FormatError(f"line {number} is no object")
        if line.get("block", "decoder") == "mtp" or line.get("mtp_idx") is not None:
            of_mtp += 1
            continue
        step, rank, layer, indices_TK = _read_line(number, line)
        if parts.setdefault((step, rank), {}).setdefault(layer, indices_TK) is not indices_TK:
            raise InputError(f"line {number} repeats layer {layer} of step {step}, rank {rank}")
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
    trace = from_megatron(by_router, num_experts, sequence_lengths=lengths, moe_layer_ids=layer_ids, holes=holes)
    if not of_mtp:
        return trace
    said = (f"{of_mtp} lines of MTP routers are of no layer of the model",)
    return RoutingTrace._of_checked(
        trace.compact_ids, trace.reasons, trace.offsets, num_experts, trace.moe_layer_ids, assumed=said
    )


def _read_line(number: int, line: Mapping[str, Any]) -> tuple[int, int, int, np.ndarray]:
    """(step, rank, layer, ids int64 [T, K]) of one line. Raises: FormatError, InputError, naming the line."""
    missing = [key for key in ("step", "layer", "rank", "num_tokens", "topk", "top_indices") if key not in line]
    if missing:
        raise FormatError(f"line {number} has no {missing[0]!r}, only {sorted(line)}")
    try:
        indices, top_k = np.asarray(line["top_indices"]), whole(line["topk"])
        if indices.size == 0:
            indices = indices.reshape(0, top_k)
        if indices.ndim != 2 or indices.shape[1] != top_k:  # cut anew, rows would be of other tokens
            raise ValueError(f"top_indices has shape {list(indices.shape)}, and topk is {top_k}")
        if indices.size and indices.dtype.kind not in "iu":  # a cast would make 1.5 an expert
            raise TypeError(f"top_indices has {indices.dtype}")
        step, rank, layer = (whole(line[key]) for key in ("step", "rank", "layer"))
    except (ValueError, TypeError, OverflowError) as error:
        raise FormatError(
            f"line {number} must have integers, and in top_indices [tokens, topk] of them: {error}"
        ) from None
    if len(indices) != line["num_tokens"]:
        raise InputError(f"line {number} has {len(indices)} tokens in top_indices, but num_tokens {line['num_tokens']}")
    return step, rank, layer, indices.astype(np.int64)
