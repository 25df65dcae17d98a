"""Every config of a folder, compiled for its device at its layer's sizes: no spills, and inside the limits."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ..configs.config import GENERATIONS, misfit, parse_config
from ..configs.files import Entry, load_entries
from ..configs.limits import Device, device_for
from ..configs.products import PRODUCTS
from ..form import GPT_OSS, ExpertForm
from ..planner.errors import FormatError
from .compile_task import Outcome, Task
from .search import REPLICAS


@dataclass(frozen=True)
class Check:
    """What to compile (each thing once, for all devices of a target), and the faults found without compiling."""

    tasks: list[Task]
    faults: list[str]
    configs: int


def check_folder(folder: Path, *, sample: int | None = None, seed: str = "") -> Check:
    """Read every file of `folder`; with `sample`, choose that many of what is to be compiled, by `seed`."""
    tasks, faults, configs = dict[Task, None](), [], 0
    for path in sorted(folder.glob("*/*.json")):
        device = path.parent.name
        if device not in PRODUCTS:
            faults.append(f"{path}: {device} is not a known device: {', '.join(PRODUCTS)}")
            continue
        try:
            entries = load_entries(path, device, path.stem)
        except FormatError as error:
            faults.append(str(error))
            continue
        for entry in entries:
            if not entry.is_of(path.stem):
                now, name = GENERATIONS.get(path.stem, 1), f"{entry.part} H={entry.H} I={entry.I}"
                faults.append(f"{path}: {name} is of generation {entry.generation} of {path.stem}; it must be {now}")
            for bucket in entry.buckets:
                configs += 1
                config, limits = parse_config(bucket.config), device_for(PRODUCTS[device])
                fault = misfit(path.stem, config, limits, torch.bfloat16)
                if fault:
                    faults.append(f"{path}: {bucket.config} of {entry.part} H={entry.H} I={entry.I}: {fault}")
                else:
                    tasks |= dict.fromkeys(_tasks(path.stem, entry, str(config), PRODUCTS[device].target))
    chosen = sorted(tasks, key=lambda task: hashlib.sha256(f"{seed} {task.target} {task.key}".encode()).digest())
    return Check(chosen[:sample], faults, configs)


def _tasks(kernel: str, entry: Entry, config: str, target: str) -> list[Task]:
    form = ExpertForm(is_transposed=entry.transposed, is_concatenated=not entry.interleaved)
    if entry.interleaved and (entry.transposed or kernel == "swiglu"):
        form = GPT_OSS  # the only such family: with biases and a clamped activation
    sizes = (target, kernel, entry.part, config, entry.H, entry.I, form)
    return [Task(*sizes, replicas) for replicas in REPLICAS]


def fault_of(task: Task, outcome: Outcome, device: Device) -> str:
    """What is wrong with a compiled config; empty where nothing is."""
    if isinstance(outcome, str):
        return f"{task.target} {task.key}: does not compile: {outcome}"
    if outcome.spill_bytes:
        return f"{task.target} {task.key}: spills {outcome.spill_bytes} bytes a thread"
    if outcome.shared_bytes > device.shared_bytes:
        return f"{task.target} {task.key}: takes {outcome.shared_bytes} bytes of shared memory of {device.shared_bytes}"
    return ""
