"""vLLM: `CompletionOutput.routed_experts`, numpy [N - 1, L, K] for each sequence of N tokens.

uint8, uint16 or (older releases) int16; prompt rows included; every hidden layer, so dense layers appear as zeros; ids
are logical and not ordered by score; the row of the last sampled token does not exist.
"""

from collections.abc import Sequence

import numpy as np

from ..errors import InputError, ReLibraError, ShapeError
from ..trace import RoutingTrace


def from_vllm(
    routed_experts: Sequence[np.ndarray],
    num_experts: int,
    *,
    num_tokens: Sequence[int] | None = None,
    moe_layer_ids: Sequence[int] | None = None,
) -> RoutingTrace:
    """A trace of these sequences, with a -1 row for the last sampled token of each.

    num_tokens:    N of each sequence (prompt and completion); a sequence recorded with another length is refused,
                   since routing that is shifted by one token is wrong without any other sign
    moe_layer_ids: the MoE layers among all hidden layers; None takes every layer
    """
    if not len(routed_experts):
        raise InputError("routed_experts is empty, but must hold at least one sequence")
    if num_tokens is not None and len(num_tokens) != len(routed_experts):
        raise InputError(f"num_tokens has {len(num_tokens)} entries, but routed_experts has {len(routed_experts)}")
    dtype = np.int8 if num_experts <= 128 else np.int16
    first = np.asarray(routed_experts[0])
    parts = []
    for index, recorded in enumerate(routed_experts):
        ids = np.asarray(recorded)
        if ids.ndim != 3 or ids.dtype not in (np.uint8, np.uint16, np.int16) or ids.shape[1:] != first.shape[1:]:
            raise ShapeError(
                f"routed_experts of sequence {index} is {ids.dtype} of shape {ids.shape}, but must be uint8, uint16 "
                f"or int16 [tokens - 1, layers, k] with the layers and k of the first, {first.shape[1:]}"
            )
        if num_tokens is not None and len(ids) != num_tokens[index] - 1:
            raise InputError(
                f"routed_experts of sequence {index} has {len(ids)} rows, but its {num_tokens[index]} tokens "
                f"need {num_tokens[index] - 1}: one for each token but the last"
            )
        if moe_layer_ids is not None:
            if len(moe_layer_ids) == 0 or max(moe_layer_ids) >= ids.shape[1] or min(moe_layer_ids) < 0:
                raise InputError(f"moe_layer_ids is {list(moe_layer_ids)}, but {ids.shape[1]} layers were recorded")
            ids = ids[:, list(moe_layer_ids)]
        if ids.size and (ids.min() < 0 or ids.max() >= num_experts):
            worst = int(ids.max()) if ids.max() >= num_experts else int(ids.min())
            raise InputError(
                f"routed_experts of sequence {index} names expert {worst}, but there are {num_experts} experts"
            )
        rows = np.full((len(ids) + 1, *ids.shape[1:]), -1, dtype)
        rows[:-1] = ids
        parts.append(rows)
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    layers = tuple(range(first.shape[1])) if moe_layer_ids is None else tuple(moe_layer_ids)
    try:
        return RoutingTrace(np.concatenate(parts), offsets, num_experts, layers)
    except ReLibraError as error:
        raise type(error)(f"routed_experts: {error}") from None
