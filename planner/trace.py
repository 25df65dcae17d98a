"""RoutingTrace: which experts every token of a batch chose, as the rollout engine recorded it."""

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError, ShapeError
from .plots import plot_load
from .printing import line_of, table_of
from .trace_files import load_arrays, save_arrays
from .trace_report import (
    KNOWN,
    TraceReport,
    VersionSpan,
    checked_reasons,
    cut_versions,
    default_reasons,
    report_of,
    selected_versions,
)
from .trace_rules import (
    check_id_dtype,
    check_ids,
    check_num_experts,
    check_offsets,
    checked_numbers,
    compacted,
    id_dtype,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class RoutingTrace:
    """Expert ids of every token of every sequence, checked once on construction. Never changed afterwards.

    Ids take one byte for up to 256 experts and two beyond, in memory, on disk and when pickled (`compact_ids`).
    `expert_ids`, `sequence` and `rows` give them signed, with -1 for tokens whose routing was not recorded.

    offsets:       int64 [sequences + 1]; sequence i is the rows offsets[i] to offsets[i + 1], all of its tokens
    num_experts:   E; ids are 0 to E - 1
    moe_layer_ids: the model's layer number of each of the L layers
    unknown:       bool [tokens]; a token is known in every layer, or in none
    reasons:       uint8 [tokens], why it is unknown (`trace_report.REASONS`); 0 where it is known
    versions:      which policy generated which tokens, where the engine said so
    report:        what the trace leaves out, and what its loader assumed
    """

    __slots__ = ("_assumed", "_dropped", "_ids", "_layers", "_num_experts", "_offsets", "_reasons", "_versions")

    def __init__(
        self,
        expert_ids: Any,
        offsets: Any,
        num_experts: int,
        moe_layer_ids: Iterable[int],
        *,
        unknown: Any = None,
        versions: Iterable[VersionSpan] = (),
        layers_dropped: Iterable[int] = (),
    ) -> None:
        """Check and keep.

        Args:
            expert_ids: [tokens, L, K] of any integer dtype that holds num_experts ids; not copied where it is as
                narrow as the trace keeps it. Of signed ids, a row of -1 is an unknown token.
            unknown: bool or uint8 (reasons) [tokens]; needed for unsigned ids with unknown tokens, whose rows may hold
                anything.

        Raises: ShapeError, InputError.
        """
        ids = np.asarray(expert_ids)
        if ids.ndim != 3 or ids.dtype.kind not in "iu" or min(ids.shape[1:], default=0) < 1:
            raise ShapeError(
                f"expert_ids is {ids.dtype} of shape {ids.shape}, but must be integers [tokens, layers, k] with at "
                "least one layer and one choice a token"
            )
        experts = check_num_experts(num_experts)
        if ids.shape[2] > experts:
            raise InputError(f"num_experts is {experts}, but must be at least the {ids.shape[2]} choices of a token")
        check_id_dtype(ids.dtype, experts, "expert_ids")
        checked = check_offsets(offsets, len(ids))
        layers = tuple(checked_numbers(moe_layer_ids, "moe_layer_ids").tolist())
        if len(layers) != ids.shape[1] or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise InputError(f"moe_layer_ids is {layers}, but must be {ids.shape[1]} increasing layer numbers")
        reasons = None if unknown is None else checked_reasons(unknown, checked)
        found = check_ids(ids, experts, None if reasons is None else reasons > KNOWN)
        if reasons is None:
            reasons = default_reasons(found, checked)
        self._ids, self._reasons, self._offsets = compacted(ids, found, experts), reasons, checked
        self._num_experts, self._layers = experts, layers
        self._versions, self._dropped = tuple(versions), tuple(int(layer) for layer in layers_dropped)
        self._assumed: tuple[str, ...] = ()

    @classmethod
    def _of_checked(
        cls,
        ids: np.ndarray,
        reasons: np.ndarray,
        offsets: np.ndarray,
        num_experts: int,
        layers: tuple[int, ...],
        versions: tuple[VersionSpan, ...] = (),
        dropped: tuple[int, ...] = (),
        assumed: tuple[str, ...] = (),
    ) -> "RoutingTrace":
        """Of compact ids that were checked already, rows of ones where reasons say unknown."""
        trace = object.__new__(cls)
        trace._ids, trace._reasons, trace._offsets, trace._num_experts = ids, reasons, offsets, num_experts
        trace._layers, trace._versions, trace._dropped, trace._assumed = layers, versions, dropped, assumed
        return trace

    def __repr__(self) -> str:
        return line_of("RoutingTrace", self._facts())

    def _repr_html_(self) -> str:
        return table_of("RoutingTrace", self._facts())

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """A heat map of how often each expert of each layer was chosen, 1 being the mean; returns its axes.

        Args: ax: to draw on; None: a new figure. Raises: InputError where matplotlib is not installed.
        """
        known, bins = self._ids[self._reasons == KNOWN], self._num_experts
        counts = [np.bincount(known[:, layer].reshape(-1), minlength=bins) for layer in range(self.num_layers)]
        mean = max(known[:, 0].size / bins, 1 / bins)
        return plot_load(np.stack(counts) / mean, self._layers, ax)

    def _facts(self) -> dict[str, object]:
        unknown = int(np.count_nonzero(self._reasons))
        facts: dict[str, object] = {
            "sequences": self.num_sequences,
            "tokens": self.num_tokens,
            "of them not recorded": unknown,
        }
        return facts | {"layers": self.num_layers, f"of {self.num_experts} experts a token": self.top_k}

    @property
    def compact_ids(self) -> np.ndarray:
        """uint8 (up to 256 experts) or uint16 [tokens, L, K] as they are kept, without a copy; ones where unknown."""
        return self._ids

    @property
    def expert_ids(self) -> np.ndarray:
        """int8, int16 or int32 [tokens, L, K], -1 where unknown. A view, but for 129 to 256 and over 32,768 experts:
        there it is a copy, so use `sequence`, `rows` or `compact_ids` where a part is enough."""
        return self._signed(slice(None))

    @property
    def offsets(self) -> np.ndarray:
        return self._offsets

    @property
    def num_experts(self) -> int:
        return self._num_experts

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        return self._layers

    @property
    def reasons(self) -> np.ndarray:
        return self._reasons

    @property
    def versions(self) -> tuple[VersionSpan, ...]:
        return self._versions

    @property
    def report(self) -> TraceReport:
        return report_of(self._reasons, self._offsets, self._dropped, self._assumed)

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    @property
    def num_layers(self) -> int:
        return self._ids.shape[1]

    @property
    def top_k(self) -> int:
        return self._ids.shape[2]

    @property
    def num_sequences(self) -> int:
        return len(self._offsets) - 1

    @property
    def unknown(self) -> np.ndarray:
        """bool [tokens]: whose routing is not known."""
        return self._reasons > KNOWN

    @property
    def only_last_tokens_unknown(self) -> bool:
        """Whether every unknown row is the last token of its sequence, which no later token attends to."""
        known = self._reasons == KNOWN
        starts, ends = self._offsets[:-1], self._offsets[1:]
        known[ends[ends > starts] - 1] = True
        return bool(known.all())

    def sequence(self, index: int) -> np.ndarray:
        """[n, L, K] of one sequence's tokens, signed as in `expert_ids`."""
        return self._signed(self._slice(index))

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """[n, L, K] of these rows of the trace, signed as in `expert_ids`; row -1 is padding and gives -1."""
        rows = checked_numbers(rows, "rows")
        if rows.size and not -1 <= rows.min() <= rows.max() < max(len(self._ids), 1):
            raise InputError(f"rows span {rows.min()}..{rows.max()}, but the trace has rows 0..{len(self._ids) - 1}")
        if not len(self._ids):
            return np.full((len(rows), *self._ids.shape[1:]), -1, id_dtype(self._num_experts))
        ids = self._ids[rows].astype(id_dtype(self._num_experts))
        ids[(rows < 0) | (self._reasons[rows] > KNOWN)] = -1
        return ids

    def select(self, sequence_indices: Sequence[int] | np.ndarray) -> "RoutingTrace":
        """A trace of these sequences, in this order. Nothing of the others is kept."""
        chosen = checked_numbers(sequence_indices, "sequence_indices").tolist()
        parts = [self._slice(index) for index in chosen]
        offsets = np.cumsum([0, *(part.stop - part.start for part in parts)], dtype=np.int64)
        return self._part(
            [self._ids[part] for part in parts],
            [self._reasons[part] for part in parts],
            offsets,
            selected_versions(self._versions, chosen),
        )

    def slice_layers(self, moe_layer_ids: Iterable[int]) -> "RoutingTrace":
        """A trace of these layers, by the model's layer numbers: a pipeline stage's. Nothing of the others is kept."""
        layers = tuple(checked_numbers(moe_layer_ids, "moe_layer_ids").tolist())
        missing = sorted(set(layers) - set(self._layers))
        if missing or not layers or list(layers) != sorted(set(layers)):
            raise InputError(f"moe_layer_ids is {list(layers)}, but must be some of {list(self._layers)} in order")
        ids = np.ascontiguousarray(self._ids[:, [self._layers.index(layer) for layer in layers]])
        return RoutingTrace._of_checked(
            ids, self._reasons, self._offsets, self._num_experts, layers, self._versions, self._dropped, self._assumed
        )

    def slice_positions(self, start: int | np.ndarray = 0, stop: int | np.ndarray | None = None) -> "RoutingTrace":
        """A trace of the tokens `start` to `stop` of every sequence, cut off where it is shorter.

        Args: integers, or integers [sequences]. Nothing of the other tokens is kept.
        """
        lengths = np.diff(self._offsets)
        first, end = (np.broadcast_to(lengths if x is None else np.asarray(x), lengths.shape) for x in (start, stop))
        if first.dtype.kind not in "iu" or end.dtype.kind not in "iu" or (first < 0).any() or (end < 0).any():
            raise InputError(f"start is {start} and stop {stop}, but must be integers that are not negative")
        first = np.minimum(first, lengths)
        end = np.maximum(np.minimum(end, lengths), first)
        parts = [slice(a + i, a + j) for a, i, j in zip(self._offsets[:-1], first, end, strict=True)]
        return self._part(
            [self._ids[part] for part in parts],
            [self._reasons[part] for part in parts],
            np.concatenate([[0], np.cumsum(end - first)]).astype(np.int64),
            cut_versions(self._versions, first, end),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .npz file without pickles, one or two bytes an id."""
        save_arrays(
            path,
            self._ids,
            self._reasons,
            self._offsets,
            self._num_experts,
            self._layers,
            self._versions,
            self._dropped,
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        num_experts: int | None = None,
        *,
        sequences: Sequence[int] | np.ndarray | None = None,
        layers: Iterable[int] | None = None,
    ) -> "RoutingTrace":
        """Read a .npz file, or a share of it: only that is ever in memory.

        Args:
            num_experts: for files that lack it; must agree with files that have it.
            sequences: the numbers of the sequences to read, in the order wanted. None: all.
            layers: the model's numbers of the layers to read, in order. None: all.
        """
        return load_arrays(
            cls,
            path,
            num_experts,
            None if sequences is None else checked_numbers(sequences, "sequences"),
            None if layers is None else tuple(checked_numbers(layers, "layers").tolist()),
        )

    def _slice(self, index: int) -> slice:
        if not 0 <= index < self.num_sequences:
            raise InputError(f"sequence {index} does not exist: the trace has {self.num_sequences}")
        return slice(int(self._offsets[index]), int(self._offsets[index + 1]))

    def _signed(self, part: slice) -> np.ndarray:
        ids, dtype = self._ids[part], np.dtype(id_dtype(self._num_experts))
        if ids.itemsize == dtype.itemsize:
            return ids.view(dtype)
        signed = ids.astype(dtype)
        signed[self._reasons[part] > KNOWN] = -1
        return signed

    def _part(
        self, ids: list[np.ndarray], reasons: list[np.ndarray], offsets: np.ndarray, versions: tuple[VersionSpan, ...]
    ) -> "RoutingTrace":
        return RoutingTrace._of_checked(
            np.concatenate(ids) if ids else self._ids[:0],
            np.concatenate(reasons) if reasons else self._reasons[:0],
            offsets,
            self._num_experts,
            self._layers,
            versions,
            self._dropped,
            self._assumed,
        )
