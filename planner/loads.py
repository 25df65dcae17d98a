"""Load tables: how many assignments each expert gets, per layer, micro-batch (and source rank)."""

import os

import numpy as np

from .errors import InputError, ShapeError
from .trace import RoutingTrace
from .trace_rules import token_chunks


def count_loads(
    trace: RoutingTrace, micro_batch_of_sequence: np.ndarray, num_micro_batches: int | None = None
) -> np.ndarray:
    """int32 [L, M, E]: assignments of every expert. Tokens that were not recorded are not counted."""
    _check_trace(trace)
    group = _group_of_sequence("micro_batch_of_sequence", micro_batch_of_sequence, trace, num_micro_batches)
    count = int(group.max(initial=-1)) + 1 if num_micro_batches is None else num_micro_batches
    if count < 1:
        raise InputError("num_micro_batches is 0: the trace has no sequences to plan for")
    return _count(trace, group, count)


def load_table(
    trace: RoutingTrace,
    micro_batch_of_sequence: np.ndarray,
    rank_of_sequence: np.ndarray,
    num_micro_batches: int,
    num_ranks: int,
) -> np.ndarray:
    """int32 [L, M, R, E]: assignments of every expert by the rank that its token is on."""
    _check_trace(trace)
    micro_batch = _group_of_sequence("micro_batch_of_sequence", micro_batch_of_sequence, trace, num_micro_batches)
    rank = _group_of_sequence("rank_of_sequence", rank_of_sequence, trace, num_ranks)
    counts = _count(trace, micro_batch * num_ranks + rank, num_micro_batches * num_ranks)
    return counts.reshape(trace.num_layers, num_micro_batches, num_ranks, trace.num_experts)


def _check_trace(trace: RoutingTrace) -> None:
    if isinstance(trace, str | os.PathLike):
        raise InputError(f"trace is {str(trace)!r}, but must be a RoutingTrace: RoutingTrace.load({str(trace)!r})")
    if not isinstance(trace, RoutingTrace):
        raise InputError(f"trace is a {type(trace).__name__}, but must be a RoutingTrace")


def check_loads(loads: np.ndarray) -> np.ndarray:
    """The load table itself, or an InputError that says what is wrong with it."""
    if isinstance(loads, RoutingTrace):
        raise InputError("loads is a RoutingTrace, but must be a table: count_loads(trace, micro_batch_of_sequence)")
    if isinstance(loads, str | os.PathLike):
        raise InputError(f"loads is {str(loads)!r}, but must be an array: numpy.load(...)['loads']")
    loads = np.asarray(loads)
    if loads.ndim not in (3, 4) or loads.size == 0:
        raise ShapeError(
            f"loads has shape {loads.shape}, but must be [layers, micro-batches, experts] or "
            f"[layers, micro-batches, source ranks, experts], none of them empty"
        )
    if loads.dtype.kind not in "iu":
        raise InputError(f"loads is {loads.dtype}, but assignments are counted in integers")
    if loads.dtype.kind == "i" and loads.min() < 0:
        where = tuple(int(x) for x in np.unravel_index(int(loads.argmin()), loads.shape))
        raise InputError(f"loads{list(where)} is {loads.min()}, but a load must not be negative")
    if int(loads.max()) > np.iinfo(np.int32).max:
        raise InputError(f"loads has an entry of {loads.max()}, but must fit 32 bits")
    return loads


def total_loads(loads: np.ndarray) -> np.ndarray:
    """int64 [L, M, E]: a checked load table, summed over its source ranks where it has them."""
    loads = check_loads(loads)
    if loads.ndim == 4:
        loads = loads.sum(2, dtype=np.int64)
        if loads.max() > np.iinfo(np.int32).max:
            raise InputError(f"loads has an expert with {loads.max()} assignments, but must fit 32 bits")
    return loads.astype(np.int64)


def _group_of_sequence(name: str, value: np.ndarray, trace: RoutingTrace, count: int | None) -> np.ndarray:
    group = np.asarray(value)
    if group.shape != (trace.num_sequences,) or (group.size and group.dtype.kind not in "iu"):
        raise ShapeError(
            f"{name} is {group.dtype} of shape {group.shape}, but must be integer [{trace.num_sequences}] (sequences)"
        )
    group = group.astype(np.int64)
    if group.size and (group.min() < 0 or (count is not None and group.max() >= count)):
        raise InputError(
            f"{name} holds {group.min()} to {group.max()}, but must be 0 to {count if count else '...'} - 1"
        )
    return group


def _count(trace: RoutingTrace, group: np.ndarray, groups: int) -> np.ndarray:
    """int32 [L, groups, E]. Runs of sequences of one group are counted together, in chunks that fit the cache."""
    layers, top_k, bins = trace.num_layers, trace.top_k, trace.num_experts
    base = (np.arange(layers, dtype=np.intp) * bins)[:, None]
    counts = np.zeros((groups, layers * bins), np.int32)
    unknown = trace.unknown
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    for start, stop in zip(starts, np.append(starts, len(group))[1:], strict=True):
        first, end = int(trace.offsets[start]), int(trace.offsets[stop])
        for part in token_chunks(end - first, layers * top_k):
            rows = slice(first + part.start, first + part.stop)
            ids, hidden = trace.compact_ids[rows], unknown[rows]
            key = np.add(ids[~hidden] if hidden.any() else ids, base, dtype=np.intp)
            counts[group[start]] += np.bincount(key.reshape(-1), minlength=layers * bins).astype(np.int32)
    return np.ascontiguousarray(counts.reshape(groups, layers, bins).swapaxes(0, 1))
