"""Traces on disk: .npz files that are read a share at a time and written a batch at a time.

`expert_ids` is int8 or int16 with -1 where that holds E experts, else uint8 or uint16; `unknown` uint8 [tokens] says
which tokens are unknown and why. Older files have signed ids of any width and no `unknown`.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import FormatError, InputError, ReLibraError
from .files import Writer, load_npz, npz_keys, save_npz, scalar
from .npz_rows import NpzRows, RowSpool
from .trace_report import VersionSpan, selected_versions
from .trace_rules import check_offsets, compact_dtype, id_dtype

if TYPE_CHECKING:
    from .trace import RoutingTrace

_OPTIONAL = ("num_experts", "moe_layer_ids", "unknown", "version_spans", "version_names", "layers_dropped")


def save_arrays(
    path: str | os.PathLike[str],
    ids: np.ndarray | RowSpool,
    reasons: np.ndarray,
    offsets: np.ndarray,
    num_experts: int,
    layers: Sequence[int],
    versions: Sequence[VersionSpan],
    layers_dropped: Sequence[int],
) -> None:
    """Write a trace. `ids` are compact, in memory or spooled."""
    arrays: dict[str, np.ndarray] = {}
    stored = stored_dtype(num_experts)
    expert_ids: np.ndarray | Writer = (
        ids.view(stored) if isinstance(ids, np.ndarray) else lambda member: ids.write_to(member, stored)
    )
    if versions:
        arrays["version_spans"] = np.array([span[:3] for span in versions], np.int64)
        arrays["version_names"] = np.array([span.version for span in versions])
    if layers_dropped:
        arrays["layers_dropped"] = np.asarray(layers_dropped, np.int64)
    save_npz(
        path,
        expert_ids=expert_ids,
        unknown=reasons,
        offsets=offsets,
        num_experts=np.asarray(num_experts, np.int64),
        moe_layer_ids=np.asarray(layers, np.int64),
        **arrays,
    )


def stored_dtype(num_experts: int) -> np.dtype:
    """Signed where it takes no more bytes, so that other readers see -1."""
    compact, signed = np.dtype(compact_dtype(num_experts)), np.dtype(id_dtype(num_experts))
    return signed if signed.itemsize == compact.itemsize else compact


def load_arrays(
    cls: type["RoutingTrace"],
    path: str | os.PathLike[str],
    num_experts: int | None,
    sequences: np.ndarray | None,
    layers: tuple[int, ...] | None,
) -> "RoutingTrace":
    """The trace in a file, or these sequences and layers of it."""
    name = os.fspath(path)
    whole = sequences is None and layers is None
    arrays = load_npz(path, ("expert_ids", "offsets") if whole else ("offsets",), _OPTIONAL)
    if not whole and "expert_ids" not in npz_keys(path):
        raise FormatError(f"{name}: has no array 'expert_ids'")
    experts = _num_experts(arrays, num_experts, path)
    try:
        offsets, unknown = arrays["offsets"], arrays.get("unknown")
        ids: Any = arrays["expert_ids"] if whole else NpzRows(path, "expert_ids")
        numbers = arrays.get("moe_layer_ids", np.arange(ids.shape[1] if len(ids.shape) > 1 else 0))
        if numbers.dtype.kind not in "iu":
            raise InputError(f"moe_layer_ids is {numbers.dtype}, but must be integers")
        moe_layer_ids = tuple(int(layer) for layer in np.ravel(numbers))
        versions = _versions(arrays)
        if not whole:
            ids, offsets, unknown, moe_layer_ids = _share(ids, offsets, unknown, moe_layer_ids, sequences, layers)
            versions = versions if sequences is None else selected_versions(versions, sequences)
        dropped = [int(layer) for layer in np.ravel(arrays.get("layers_dropped", np.zeros(0, np.int64)))]
        return cls(ids, offsets, experts, moe_layer_ids, unknown=unknown, versions=versions, layers_dropped=dropped)
    except ReLibraError as error:
        raise type(error)(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    except (ValueError, TypeError, OverflowError, MemoryError, IndexError) as error:
        raise FormatError(f"{name}: is no trace: {error}") from None


def _num_experts(arrays: dict[str, np.ndarray], given: int | None, path: str | os.PathLike[str]) -> int:
    if "num_experts" in arrays:
        recorded = scalar(arrays, "num_experts", path)
        if not isinstance(recorded, np.integer):
            raise FormatError(f"{os.fspath(path)}: num_experts is {recorded!r}, but must be an integer")
        if given is not None and given != int(recorded):
            raise InputError(f"num_experts is {given}, but {os.fspath(path)} was recorded with {recorded}")
        return int(recorded)
    if given is None:
        raise FormatError(f"{os.fspath(path)}: does not say num_experts; give it (--num-experts)")
    return given


def _versions(arrays: dict[str, np.ndarray]) -> tuple[VersionSpan, ...]:
    if "version_spans" not in arrays:
        return ()
    spans, names = arrays["version_spans"], arrays.get("version_names", np.zeros(0, "U1"))
    if spans.ndim != 2 or spans.shape[1] != 3 or spans.dtype.kind not in "iu" or names.shape != spans.shape[:1]:
        raise InputError(f"version_spans has shape {spans.shape} and version_names {names.shape}, not [n, 3] and [n]")
    return tuple(
        VersionSpan(int(sequence), int(start), int(stop), str(name))
        for (sequence, start, stop), name in zip(spans, names, strict=True)
    )


def _share(
    ids: NpzRows,
    offsets: np.ndarray,
    unknown: np.ndarray | None,
    moe_layer_ids: tuple[int, ...],
    sequences: np.ndarray | None,
    layers: tuple[int, ...] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, tuple[int, ...]]:
    """Rows of some sequences and layers, read into one array of just their size."""
    if len(ids.shape) != 3:
        raise InputError(f"expert_ids has shape {ids.shape}, but must be [tokens, layers, k]")
    offsets = check_offsets(offsets, len(ids))
    chosen = np.arange(len(offsets) - 1) if sequences is None else sequences
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < len(offsets) - 1:
        raise InputError(f"sequences are {chosen.tolist()[:8]}, but the file has 0 to {len(offsets) - 2}")
    wanted = moe_layer_ids if layers is None else layers
    if not wanted or not set(wanted) <= set(moe_layer_ids) or len(moe_layer_ids) != ids.shape[1]:
        raise InputError(f"layers are {list(wanted)}, but must be some of {list(moe_layer_ids)}")
    columns = [moe_layer_ids.index(layer) for layer in wanted]
    lengths = offsets[chosen + 1] - offsets[chosen]
    places = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    out = np.empty((int(places[-1]), len(columns), ids.shape[2]), ids.dtype)
    with ids:
        for sequence, place, length in zip(chosen, places, lengths, strict=False):
            ids.read_into(out[place : place + length], int(offsets[sequence]), columns)
    if unknown is not None:
        rows = [unknown[int(offsets[s]) : int(offsets[s + 1])] for s in chosen]
        unknown = np.concatenate(rows) if rows else unknown[:0]
    return out, places, unknown, wanted
