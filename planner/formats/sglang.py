"""SGLang: `meta_info["routed_experts"]` of a response, and the counts of its expert-distribution recorder.

The first is the base64 of raw ids [N - 1 - start, L, K] without a header, of every hidden layer; `start` is the
request's `routed_experts_start_len`, 0 by default. Ids are int32, or what `routed_experts_dtype` beside them says.
The second is JSON {"logical_count": [L][E]}: how often every expert was chosen, of which a load table can be made, but
no trace.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import numpy as np

from ..errors import FormatError, InputError
from ..loads import check_loads
from ..trace import RoutingTrace
from ..trace_rules import check_num_experts
from .encoded import array_of_bytes, decode_base64, named_dtype
from .sequences import SequenceOptions, trace_of_sequences


def from_sglang(
    routed_experts: Iterable[Any],
    num_experts: int,
    *,
    num_layers: int,
    top_k: int,
    **options: Unpack[SequenceOptions],
) -> RoutingTrace:
    """A trace of these sequences, with the last sampled token of each unknown.

    routed_experts: of each sequence the base64, an array [rows, L, K], None where there is none, or a list of these,
                    one a turn; also a response or its `meta_info`, whose `routed_experts_start_len` and
                    `routed_experts_dtype` are honoured
    num_layers:     all hidden layers, as the payload has no header; top_k: K
    options:        as `SequenceOptions` has them; `starts` is `routed_experts_start_len` of each
    """
    for name, value in (("num_layers", num_layers), ("top_k", top_k)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise InputError(f"{name} is {value!r}, but must be a positive integer")

    def decode(payload: Any, name: str) -> Any:
        dtype = "int32"
        if isinstance(payload, Mapping) and {"data", "dtype"} == set(payload):
            payload, dtype = payload["data"], named_dtype(payload["dtype"], name)
        if not isinstance(payload, str | bytes):
            return payload
        return array_of_bytes(decode_base64(payload, name), dtype, (-1, num_layers, top_k), name)

    return trace_of_sequences(routed_experts, num_experts, last_token="left out", decode=decode, **options)


def loads_from_sglang(statistics: Mapping[str, Any], num_experts: int) -> np.ndarray:
    """int32 [L, 1, E] of {"logical_count": [L][E]}, layers without counts (dense ones) left out.

    Counts of the whole recording are one micro-batch: they say which experts are hot, not when.
    """
    check_num_experts(num_experts)
    if not isinstance(statistics, Mapping):
        raise FormatError(f"statistics are {str(statistics)[:40]!r}, but must be an object with 'logical_count'")
    if "logical_count" not in statistics:
        raise FormatError(f"statistics have no 'logical_count', only {sorted(map(str, statistics))[:8]}")
    try:
        counts = np.asarray(statistics["logical_count"])
    except (ValueError, TypeError, OverflowError) as error:
        raise FormatError(f"logical_count is no rectangular table: {error}") from None
    if counts.ndim != 2 or counts.shape[1] != num_experts:
        raise FormatError(f"logical_count has shape {counts.shape}, but must be [layers, {num_experts} experts]")
    if counts.dtype.kind == "f" and np.isfinite(counts).all() and (counts == np.floor(counts)).all():
        counts = counts.astype(np.int64)
    loads = check_loads(counts[:, None])[counts.any(1)]
    if not len(loads):
        raise FormatError("logical_count is zero everywhere: nothing was recorded")
    return loads.astype(np.int32)
