"""Which config a launch gets: looked up, never searched. Nothing here compiles or times.

Asked in this order: `RELIBRA_CONFIG`, configs agreed on by `warmup`, the user's folder, the shipped folder (of both,
what was measured before what was only compiled), and a heuristic that always answers. The logger of this
module says at level INFO which one did.

A file answers only for a layer of exactly its sizes and layout. Of the layer's buckets the nearest answers, by rows a
slot first, then by slots, both counted in powers of two; of two equally near ones the larger. A bucket further away
than `REACH` does not answer, nor does what was found for another generation of a kernel (`config.GENERATIONS`).
"""

import logging
import os
from typing import NamedTuple

import torch

from ..planner.errors import FormatError, InputError
from .config import Config, misfit, parse_config
from .files import SHIPPED, Entry, load_entries, path_of, user_folder
from .limits import Device
from .spaces import SPACE, config_for

_LOGGER = logging.getLogger(__name__)
REACH = 2, 3  # octaves of rows a slot, octaves of slots
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_OTHER_DTYPES = {"bf16": ("bf16",), "fp16": ("fp16", "bf16"), "fp32": ("fp32",)}


class LaunchKey(NamedTuple):
    """What decides the config of a launch; `slots` and `rows_per_slot` are octaves, the rest as in `Entry.sizes`.

    `part` is empty where the sizes say which part of a layer it is.
    """

    kernel: str
    device: Device
    dtype: torch.dtype
    n: int
    d: int
    layout: bool
    interleaved: bool
    slots: int
    rows_per_slot: int
    part: str = ""


class Answer(NamedTuple):
    """A config, and where it came from, for the log: a word on the file, the environment, `warmup` or the heuristic."""

    config: Config
    source: str


_answers: dict[LaunchKey, Answer] = {}
_files: dict[tuple[str, str, str], list[Entry]] = {}
_agreed: dict[tuple, Config] = {}
_overrides: dict[str, Config] | None = None


def octave(count: int) -> int:
    """0 for 0, and k + 1 for counts from 2^k to 2^(k+1) - 1."""
    return count.bit_length()


def config_of(
    kernel: str,
    device: Device,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    num_rows: int,
    num_slots: int,
    layout: bool,
    interleaved: bool = False,
    part: str = "",
) -> Config:
    """The config of one launch; sizes (N, D) and layout as in `Entry.sizes`."""
    rows_per_slot = (num_rows // num_slots).bit_length()
    key = LaunchKey(kernel, device, dtype, *sizes, layout, interleaved, num_slots.bit_length(), rows_per_slot, part)
    found = _answers.get(key)
    return (found or answer(key)).config


def answer(key: LaunchKey) -> Answer:
    """The config for `key` and where it comes from. Remembered after the first time."""
    found = _answers.get(key)
    if found is None:
        _answers[key] = found = _asked(key)
        _log(key, found)
    return found


def answers_for_all_rows(octaves: int) -> dict[LaunchKey, Answer]:
    """The answers to everything that was asked so far, with any number of rows a slot below 2^octaves."""
    asked = dict.fromkeys(key._replace(rows_per_slot=rows) for key in _answers for rows in range(octaves + 1))
    return {key: answer(key) for key in asked}


def answers() -> dict[LaunchKey, Answer]:
    """Everything that was asked so far, with what it got."""
    return dict(_answers)


def forget() -> None:
    """Read everything again: files and environment may have changed."""
    global _overrides
    _answers.clear()
    _files.clear()
    _agreed.clear()
    _overrides = None


def agree(configs: dict[tuple, Config]) -> None:
    """Use `configs` (by key without its device) before any file; all ranks of a run call this with the same."""
    _answers.clear()
    _agreed.update(configs)


def _asked(key: LaunchKey) -> Answer:
    kernel, device, dtype = key.kernel, key.device, key.dtype
    if device.interpreted:
        return Answer(config_for(kernel, device, dtype, 0, 1), "interpreter")
    override = _from_environment().get(kernel)
    if override is not None:
        fault = misfit(kernel, override, device, dtype)
        if fault:
            raise InputError(f"RELIBRA_CONFIG gives {kernel} {override}, but {fault}")
        return Answer(override, "RELIBRA_CONFIG")
    agreed = _agreed.get(without_device(key))
    if agreed is not None:
        fault = misfit(kernel, agreed, device, dtype)
        if fault:
            raise InputError(f"the first rank chose {kernel} {agreed} for all, but here {fault}")
        return Answer(agreed, "warmup")
    for evidence in ("measured", "compiled") if dtype in DTYPES else ():
        for source, folder in (("user", user_folder()), ("shipped", SHIPPED)):
            config = _nearest(key, _entries(source, folder, key), evidence)
            if config is not None:
                return Answer(config, f"{source} {device.product}, {evidence}")
    slots, rows_per_slot = _size(key.slots), _size(key.rows_per_slot)
    return Answer(config_for(kernel, device, dtype, rows_per_slot * slots, slots), "heuristic")


def without_device(key: LaunchKey) -> tuple:
    return (key.kernel, *key[2:])


def _size(octave: int) -> int:
    """The middle of an octave."""
    return (3 << octave) >> 2


def _nearest(key: LaunchKey, entries: list[Entry], evidence: str) -> Config | None:
    """The config of the nearest bucket in reach, of the exact dtype before another; None where there is none."""
    wanted = (key.n, key.d, key.layout, key.interleaved)
    for dtype in _OTHER_DTYPES[DTYPES[key.dtype]]:
        best: tuple | None = None
        for entry in entries:
            if entry.evidence != evidence or entry.dtype != dtype or not entry.is_of(key.kernel):
                continue
            if entry.sizes(key.kernel) != wanted:
                continue
            if key.part not in ("", entry.part):
                continue
            for bucket in entry.buckets:
                rows, slots = octave(bucket.rows_per_slot), octave(bucket.slots)
                far = abs(rows - key.rows_per_slot), abs(slots - key.slots)
                if far[0] <= REACH[0] and far[1] <= REACH[1]:
                    config = parse_config(bucket.config)
                    if not misfit(key.kernel, config, key.device, key.dtype):
                        order = (*far, -rows, -slots, bucket.us, bucket.config)
                        best = min(best or (order, config), (order, config), key=lambda pair: pair[0])
        if best is not None:
            return best[1]
    return None


def _entries(source: str, folder: object, key: LaunchKey) -> list[Entry]:
    """The entries of the key's file; a file that cannot be used is named in a warning, once, and skipped."""
    kernel, device = key.kernel, key.device
    if not device.product:
        return []
    file = (source, device.product, kernel)
    if file not in _files:
        path = path_of(user_folder() if source == "user" else SHIPPED, device.product, kernel)
        try:
            _files[file] = entries = load_entries(path, device.product, kernel)
        except FormatError as error:
            _files[file] = entries = []
            _LOGGER.warning("%s; it is not used", error)
        for entry in entries:
            for bucket in entry.buckets:
                fault = misfit(kernel, parse_config(bucket.config), device, torch.bfloat16)
                if fault:
                    _LOGGER.warning(
                        "%s: %s does not fit a %s: %s; it is not used", path, bucket.config, device.product, fault
                    )
    return _files[file]


def _from_environment() -> dict[str, Config]:
    """`RELIBRA_CONFIG=gate_up=128x128x64w8s3,grad_weight=...`, read once."""
    global _overrides
    if _overrides is None:
        overrides = {}
        for part in filter(None, os.environ.get("RELIBRA_CONFIG", "").split(",")):
            kernel, _, config = part.strip().partition("=")
            if kernel not in SPACE:
                raise InputError(f"RELIBRA_CONFIG names {kernel!r}; it must be KERNEL=CONFIG of {', '.join(SPACE)}")
            overrides[kernel] = parse_config(config)
        _overrides = overrides
    return _overrides


def _log(key: LaunchKey, found: Answer) -> None:
    _LOGGER.info(
        "%s %s N=%d D=%d, %d slots and %d rows a slot or more: %s (%s)",
        f"{key.kernel} {key.part}".rstrip(),
        key.dtype,
        key.n,
        key.d,
        1 << key.slots >> 1,
        1 << key.rows_per_slot >> 1,
        *found,
    )
