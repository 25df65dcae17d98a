"""A trace that is written batch after batch, and is never in memory at once."""

import os
from pathlib import Path

import numpy as np

from .errors import InputError
from .npz_rows import RowSpool
from .trace import RoutingTrace
from .trace_files import save_arrays
from .trace_report import TraceReport, VersionSpan, report_of


class TraceWriter:
    """Collects traces of consecutive sequences and writes them as one, as `RoutingTrace.save` would.

    Beside the file, their ids lie in a temporary one without a name until `close`; without it nothing is left.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        self._ids = RowSpool(self._path.parent)
        self._first: RoutingTrace | None = None
        self._reasons: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._versions: list[VersionSpan] = []
        self._assumed: list[str] = []

    @property
    def first(self) -> RoutingTrace | None:
        """What was appended first: later traces must have its layers, choices and experts."""
        return self._first

    def append(self, trace: RoutingTrace) -> None:
        """Raises: InputError where a trace has other layers, choices or experts than the first."""
        if self._first is None:
            self._first = trace.select([])
        for name in ("moe_layer_ids", "top_k", "num_experts"):
            before, now = getattr(self._first, name), getattr(trace, name)
            if before != now:
                raise InputError(f"{name} is {now} from sequence {self.num_sequences} on, but was {before} before")
        first = self.num_sequences
        self._ids.append(trace.compact_ids)
        self._reasons.append(trace.reasons)
        self._lengths.append(np.diff(trace.offsets))
        self._versions += [span._replace(sequence=span.sequence + first) for span in trace.versions]
        self._assumed += [text for text in trace.report.assumed if text not in self._assumed]

    @property
    def num_sequences(self) -> int:
        return sum(map(len, self._lengths))

    @property
    def report(self) -> TraceReport:
        reasons, offsets, first = self._together()
        return report_of(reasons, offsets, first.report.layers_dropped, tuple(self._assumed))

    def close(self) -> None:
        """Write the file. Raises: InputError where nothing was appended."""
        reasons, offsets, first = self._together()
        dropped = first.report.layers_dropped
        save_arrays(
            self._path, self._ids, reasons, offsets, first.num_experts, first.moe_layer_ids, self._versions, dropped
        )
        self._ids.close()

    def _together(self) -> tuple[np.ndarray, np.ndarray, RoutingTrace]:
        if self._first is None:
            raise InputError(f"{self._path}: there is no sequence to write")
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(self._lengths))]).astype(np.int64)
        return np.concatenate(self._reasons), offsets, self._first
