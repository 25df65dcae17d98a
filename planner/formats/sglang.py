"""SGLang: `meta_info["routed_experts"]` of a response, and the counts of its expert-distribution recorder.

The first is the base64 of raw int32 [N - 1, L, K] without a header, of every hidden layer. The second is JSON
{"logical_count": [L][E]}: how often every expert was chosen, of which a load table can be made, but no trace.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from ..errors import FormatError, InputError
from ..loads import check_loads
from ..trace import RoutingTrace
from .encoded import array_of_bytes, decode_base64
from .sequences import SequenceOptions, trace_of_sequences


def from_sglang(
    routed_experts: Sequence[str],
    num_experts: int,
    *,
    num_layers: int,
    top_k: int,
    **options: Unpack[SequenceOptions],
) -> RoutingTrace:
    """A trace of these sequences. `num_layers` counts all hidden layers; see `from_vllm` for the rest."""
    for name, value in (("num_layers", num_layers), ("top_k", top_k)):
        if value < 1:
            raise InputError(f"{name} is {value}, but must be positive")
    arrays = []
    for index, text in enumerate(routed_experts):
        what = f"routed_experts of sequence {index}"
        arrays.append(array_of_bytes(decode_base64(text, what), np.int32, (-1, num_layers, top_k), what))
    return trace_of_sequences(arrays, num_experts, last_token="left out", dtypes=(np.int32,), **options)


def loads_from_sglang(statistics: Mapping[str, Any], num_experts: int) -> np.ndarray:
    """int32 [L, 1, E] of {"logical_count": [L][E]}, layers without counts (dense ones) left out.

    Counts of the whole recording are one micro-batch: they say which experts are hot, not when.
    """
    if "logical_count" not in statistics:
        raise FormatError(f"statistics have no 'logical_count', only {sorted(statistics)}")
    try:
        counts = np.asarray(statistics["logical_count"])
    except ValueError as error:
        raise FormatError(f"logical_count is no rectangular table: {error}") from None
    if counts.ndim != 2 or counts.shape[1] != num_experts:
        raise FormatError(f"logical_count has shape {counts.shape}, but must be [layers, {num_experts} experts]")
    if counts.dtype.kind == "f" and (counts == np.floor(counts)).all():
        counts = counts.astype(np.int64)
    loads = check_loads(counts[:, None])[counts.any(1)]
    if not len(loads):
        raise FormatError("logical_count is zero everywhere: nothing was recorded")
    return loads.astype(np.int32)
