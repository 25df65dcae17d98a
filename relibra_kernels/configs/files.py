"""Config files: one JSON file a kernel and device, read with every check, written whole or not at all."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..planner.errors import FormatError
from ..planner.files import written_whole
from .config import GENERATIONS, ROW_KERNELS
from .schema import first_fault

SHIPPED = Path(__file__).parents[1] / "autotune_configs"
SCHEMA_VERSION = 1
_SHAPE = ("part", "dtype", "H", "I", "transposed", "interleaved")
_PROVENANCE = ("evidence", "triton", "driver", "date", "generation")


@dataclass(frozen=True)
class Bucket:
    """A config, and the sizes it is for: `slots` to twice as many, with `rows_per_slot` to twice as many rows each.

    Attributes:
        slots, rows_per_slot: powers of two; rows are the mean over the slots.
        config: as `parse_config` reads it.
        us: microseconds of one launch, measured or modelled.
        spread: (80th - 20th percentile) / median of the measured times; None where nothing was measured.
    """

    slots: int
    rows_per_slot: int
    config: str
    us: float
    spread: float | None = None


@dataclass(frozen=True)
class Entry:
    """The configs of one layer shape from one origin; fields as in `autotune_configs/schema.json`."""

    part: str
    dtype: str
    H: int
    I: int  # noqa: E741
    transposed: bool
    interleaved: bool
    evidence: str
    triton: str
    driver: str | None
    date: str
    buckets: tuple[Bucket, ...]
    models: tuple[str, ...] = ()
    generation: int = 1

    @property
    def shape(self) -> tuple:
        return tuple(getattr(self, name) for name in _SHAPE)

    @property
    def provenance(self) -> tuple:
        return tuple(str(getattr(self, name) or "") for name in _PROVENANCE)

    def is_of(self, kernel: str) -> bool:
        """Whether it was found for `kernel` as it is now."""
        return self.generation == GENERATIONS.get(kernel, 1)

    def sizes(self, kernel: str) -> tuple[int, int, bool, bool]:
        """(N, D, layout, interleaved) as the launcher of `kernel` sees this layer.

        N and D are the kernel's constants of that name (I and D of gate_up and grad_hidden). The layout is whether
        weights are stored `[N, D]`; of grad_weight, whether the left rows are picked by index. A kernel without tensor
        cores has one width and no layout; the width of replica_reduce is the size of one expert's tensor.
        """
        hidden, intermediate_size, transposed = self.H, self.I, self.transposed
        if kernel in ROW_KERNELS:
            return self._width(kernel), 0, False, self.interleaved and kernel == "swiglu"
        if kernel == "gate_up":
            return intermediate_size, hidden, not transposed, self.interleaved
        if kernel == "grad_hidden":
            return intermediate_size, hidden, transposed, self.interleaved
        if kernel == "grouped_gemm":
            return (
                (hidden, intermediate_size, not transposed, False)
                if self.part == "down"
                else (hidden, 2 * intermediate_size, transposed, False)
            )
        if self.part == "down":
            return (intermediate_size, hidden, False, False) if transposed else (hidden, intermediate_size, True, False)
        return (
            (hidden, 2 * intermediate_size, True, False)
            if transposed
            else (2 * intermediate_size, hidden, False, False)
        )

    def _width(self, kernel: str) -> int:
        if kernel == "permute":
            return self.H
        if kernel == "swiglu":
            return self.I
        if kernel == "schedule":
            return 0
        columns = 2 * self.I if self.part == "gate_up" else self.H  # of a bias
        if kernel == "grad_bias":
            return columns
        return columns * (self.H if self.part == "gate_up" else self.I)


def path_of(folder: Path, device: str, kernel: str) -> Path:
    return folder / device / f"{kernel}.json"


def user_folder() -> Path:
    """`RELIBRA_CONFIG_DIR`, or `relibra/configs` in the user's cache directory."""
    named = os.environ.get("RELIBRA_CONFIG_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relibra" / "configs"


def load_entries(path: Path, device: str, kernel: str) -> list[Entry]:
    """The entries of a file; none where there is no file. Whatever is wrong is a FormatError that names the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not JSON: {error}") from None
    if isinstance(document, dict) and document.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise FormatError(
            f"{path}: schema_version is {document['schema_version']!r}; this version of relibra-kernels reads "
            f"{SCHEMA_VERSION}"
        )
    fault = first_fault(document, _schema())
    if not fault and (document["kernel"], document["device"]) != (kernel, device):
        fault = f"it is for {document['kernel']} on {document['device']}, not for {kernel} on {device}"
    if fault:
        raise FormatError(f"{path}: {fault}")
    return [_entry(fields) for fields in document["entries"]]


def _entry(fields: dict[str, Any]) -> Entry:
    buckets = tuple(Bucket(**bucket) for bucket in fields["buckets"])
    return Entry(**{**fields, "buckets": buckets, "models": tuple(fields["models"])})


@cache
def _schema() -> dict[str, Any]:
    return json.loads((SHIPPED / "schema.json").read_text(encoding="utf-8"))


def update(path: Path, device: str, kernel: str, change: Callable[[list[Entry]], list[Entry]]) -> None:
    """Replace a file's entries by `change(entries)`, one writer after the other; readers see the old or the new file.

    Raises: FormatError where the folder cannot be written, or what is there is no such file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            entries = change(load_entries(path, device, kernel))
            with written_whole(path) as file:
                file.write(_text(device, kernel, entries).encode())
    except OSError as error:
        raise FormatError(f"{path}: cannot be written: {error.strerror or error}") from None


def merged(old: list[Entry], new: list[Entry], *, whole: bool = False) -> list[Entry]:
    """Both: a new bucket replaces the old one of its shape, evidence and sizes; of two new ones the first stays.

    Args:
        whole: the new entries replace everything that was known about their models. An old entry of the same shape
            and evidence is dropped if all of its models are among theirs; one that serves another model too stays.
    """
    anew: dict[tuple, dict[str, None]] = {}  # the new entries' models, then the old ones' too
    for entry in new:
        anew.setdefault((entry.shape, entry.evidence), {}).update(dict.fromkeys(entry.models))
    if whole:
        old = [
            entry
            for entry in old
            if (entry.shape, entry.evidence) not in anew
            or not set(entry.models) <= anew[entry.shape, entry.evidence].keys()
        ]
    for entry in old:
        anew.get((entry.shape, entry.evidence), {}).update(dict.fromkeys(entry.models))
    new = [replace(entry, models=tuple(anew[entry.shape, entry.evidence])) for entry in new]
    replaced = {
        (entry.shape, entry.evidence, bucket.slots, bucket.rows_per_slot) for entry in new for bucket in entry.buckets
    }
    kept = []
    for entry in old:
        left = tuple(
            b for b in entry.buckets if (entry.shape, entry.evidence, b.slots, b.rows_per_slot) not in replaced
        )
        kept += [replace(entry, buckets=left)] if left else []
    together: dict[tuple, Entry] = {}
    for entry in (*kept, *new):
        key = (entry.shape, entry.provenance)
        first = together.get(key, replace(entry, buckets=()))
        sizes = {(bucket.slots, bucket.rows_per_slot) for bucket in first.buckets}
        more = tuple(bucket for bucket in entry.buckets if (bucket.slots, bucket.rows_per_slot) not in sizes)
        models = tuple(dict.fromkeys((*first.models, *entry.models)))
        together[key] = replace(first, buckets=first.buckets + more, models=models)
    return list(together.values())


def _text(device: str, kernel: str, entries: list[Entry]) -> str:
    """The file's text: sorted, one line a bucket, three significant digits."""
    lines = [
        "{",
        f'  "schema_version": {SCHEMA_VERSION},',
        f'  "kernel": {json.dumps(kernel)},',
        f'  "device": {json.dumps(device)},',
        '  "entries": [',
    ]
    ordered = sorted(entries, key=lambda entry: (entry.shape, entry.provenance))
    for number, entry in enumerate(ordered):
        values = {name: getattr(entry, name) for name in (*_SHAPE, "models", *_PROVENANCE)}
        if entry.generation == 1:  # as where it is missing
            del values["generation"]
        lines += ["    {", *(f"      {json.dumps(name)}: {json.dumps(value)}," for name, value in values.items())]
        lines.append('      "buckets": [')
        buckets = sorted(entry.buckets, key=lambda bucket: (bucket.slots, bucket.rows_per_slot))
        lines.append(",\n".join(f"        {json.dumps(_bucket_fields(bucket))}" for bucket in buckets))
        lines += ["      ]", "    }" + ("," if number + 1 < len(ordered) else "")]
    return "\n".join([*lines, "  ]", "}", ""])


def _bucket_fields(bucket: Bucket) -> dict[str, Any]:
    spread = None if bucket.spread is None else float(f"{bucket.spread:.2g}")
    return {**vars(bucket), "us": float(f"{bucket.us:.3g}"), "spread": spread}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; where the file system has no locks, whoever renames last wins."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
