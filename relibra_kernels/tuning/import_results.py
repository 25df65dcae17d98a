"""Configs out of what `bench/gpu.py tune` measured: from `results.jsonl` to entries of the config files."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..configs.config import misfit, parse_config
from ..configs.files import Bucket, Entry
from ..configs.limits import Device, device_for
from ..configs.products import product_named
from ..planner.errors import FormatError, InputError
from .models import model_named
from .search_goal import layer_shape

_WANTED = ("product", "model", "kernel", "part", "triton", "driver", "date", "buckets")


def measured_entries(path: Path) -> dict[str, dict[str, list[Entry]]]:
    """Entries by device and kernel; what a case had finished counts, whatever became of it then.

    Raises: FormatError where the file holds no measured config, or one that is none of this version's.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from None
    found: dict[str, dict[str, list[Entry]]] = {}
    for number, figures in _measured(lines):
        try:
            device, entry = _entry(figures)
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path}, line {number}: {error}") from None
        found.setdefault(device, {}).setdefault(figures["kernel"], []).insert(0, entry)  # of two, the later one counts
    if not found:
        raise FormatError(f"{path}: holds no measured configs; it must be the results of `bench/gpu.py tune` on a GPU")
    return found


def _measured(lines: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines that hold a measured config. Those of a rehearsal are left out: its times are made up."""
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            figures = result["figures"]
            is_measured = result["stage"] == "tune" and result["device"] != "rehearsal" and "buckets" in figures
        except (ValueError, KeyError, TypeError):  # cut off, or of something else
            continue
        if is_measured:
            yield number, figures


def _entry(figures: dict[str, Any]) -> tuple[str, Entry]:
    missing = [name for name in _WANTED if name not in figures]
    if missing:
        raise InputError(f"its figures have no {missing[0]!r}")
    kernel, part = figures["kernel"], figures["part"]
    device = device_for(product_named(figures["product"]))
    shape = layer_shape(model_named(figures["model"]), kernel, part)
    buckets = tuple(_bucket(kernel, device, bucket) for bucket in figures["buckets"])
    return device.product, replace(
        shape,
        evidence="measured",
        buckets=buckets,
        triton=figures["triton"],
        driver=figures["driver"],
        date=figures["date"],
    )


def _bucket(kernel: str, device: Device, figures: dict[str, Any]) -> Bucket:
    fault = misfit(kernel, parse_config(figures["config"]), device, torch.bfloat16)
    if fault:
        raise InputError(f"config {figures['config']!r} of {kernel}: {fault}")
    sizes = int(figures["slots"]), int(figures["rows_per_slot"])
    return Bucket(*sizes, figures["config"], float(figures["us"]), float(figures["spread"]))
