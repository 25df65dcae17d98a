"""`relibra doctor`: what is installed, what will be used and why, and the traps that are set, with their fixes."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from ..planner.errors import ReLibraError
from . import doctor_model

Level = Literal["ok", "note", "problem"]


class Finding(NamedTuple):
    """One thing found: `fix` says what to do about it, where something is to be done."""

    topic: str
    level: Level
    text: str
    fix: str = ""


# package -> (oldest version that works, what for)
REQUIRED = {"numpy": ("1.26", ""), "torch": ("2.11", ""), "triton": ("3.6", "the GPU kernels")}
OPTIONAL = {
    "transformers": ("5.17", "Hugging Face models"),
    "accelerate": ("1.0", "from_pretrained(..., distributed_config=...)"),
    "vllm": ("0.32", "rollouts with recorded routing"),
    "sglang": ("0.5", "rollouts with recorded routing"),
    "megatron-core": ("0.16", "RouterReplay"),
    "verl": ("0.6", "RL training"),
    "matplotlib": ("3.0", "plots of the demo"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a folder with a config.json: what works for that model")
    parser.add_argument("--json", action="store_true", help="a list of findings instead of text")


def run(args: argparse.Namespace) -> int:
    """1 where something will go wrong."""
    findings = [
        finding for check in (versions, devices, backends, configs, process_groups, traps) for finding in check()
    ]
    if args.model is not None:
        findings += [Finding("Model", *found) for found in doctor_model.examine(args.model)]
    problems = sum(finding.level == "problem" for finding in findings)
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings]))
        return 1 if problems else 0
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            print(topic)
        print(f"  {'problem: ' if finding.level == 'problem' else ''}{finding.text}")
        if finding.fix:
            print(f"    -> {finding.fix}")
    print(f"\n{problems} problems found" if problems != 1 else "\n1 problem found")
    return 1 if problems else 0


def versions() -> Iterator[Finding]:
    """Python, ours, and the packages that we work with."""
    topic = "Versions"
    yield Finding(topic, "ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding(topic, "ok", f"relibra-kernels {_version('relibra-kernels') or 'from a checkout'}")
    for package, (oldest, purpose) in (REQUIRED | OPTIONAL).items():
        installed, required = _version(package), package in REQUIRED
        if installed is None:
            missing_problem = required and not (package == "triton" and sys.platform != "linux")
            yield Finding(
                topic,
                "problem" if missing_problem else "note",
                f"{package} is not installed{f' (for {purpose})' if purpose else ''}",
                f"pip install '{package}>={oldest}'" if missing_problem else "",
            )
        elif _numbers(installed) < _numbers(oldest):
            yield Finding(
                topic,
                "problem",
                f"{package} {installed} is older than {oldest}, the oldest that works",
                f"pip install '{package}>={oldest}'",
            )
        else:
            yield Finding(topic, "ok", f"{package} {installed}")
    transformers = _version("transformers")
    if transformers is not None and (5, 17) <= _numbers(transformers) < (5, 23):
        text = f"transformers {transformers} has no hook for expert parallelism: ep_implementation='relibra' is refused"
        yield Finding(topic, "note", text, "pip install 'transformers>=5.23', or replace_moe_blocks and ExpertParallel")
    torch = _version("torch")
    if torch is not None and _numbers(torch)[:2] == (2, 11):
        text = f"torch {torch}: torch.compile(fullgraph=True) of a Hugging Face model that has not run is refused"
        yield Finding(topic, "note", text, "run the model once before it is compiled")


def devices() -> Iterator[Finding]:
    """GPUs, and whether the kernels have limits for them."""
    import torch

    topic = "Devices"
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip or ''}".strip()
        built_for_gpu = torch.version.cuda or torch.version.hip
        reason = f"torch was built for {built}, but sees no GPU" if built_for_gpu else "this torch is a CPU build"
        yield Finding(topic, "note", f"no GPU: {reason}; everything runs on the CPU, slowly")
        return
    from ..configs.limits import device_of

    for index in range(torch.cuda.device_count()):
        name = f"cuda:{index} {torch.cuda.get_device_name(index)}"
        try:
            device = device_of(torch.device("cuda", index))
            yield Finding(topic, "ok", f"{name}: configs of {device.name}, {device.shared_bytes >> 10} KiB a block")
        except ReLibraError as error:
            yield Finding(topic, "problem", f"{name}: {error}", "RELIBRA_BACKEND=reference computes in plain torch")


def backends() -> Iterator[Finding]:
    """Who computes, on each kind of device, and why."""
    import torch

    from .. import ops

    topic = "Backend"
    for kind in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        try:
            chosen = ops.backend(torch.device(kind)).__name__.rpartition(".")[2]
        except ReLibraError as error:
            yield Finding(topic, "problem", f"tensors on {kind}: {error}", "unset RELIBRA_BACKEND")
            continue
        forced = os.environ.get("RELIBRA_BACKEND")
        if forced:
            why = f"RELIBRA_BACKEND is {forced}"
        elif kind == "cpu":
            why = "Triton has no CPU target"
        else:
            why = "triton is installed" if chosen == "kernels" else "triton is not installed"
        what = "Triton kernels" if chosen == "kernels" else "plain torch (reference)"
        slow = kind == "cuda" and chosen == "reference"
        yield Finding(
            topic,
            "problem" if slow else "ok",
            f"tensors on {kind}: {what}, since {why}",
            "install triton, and unset RELIBRA_BACKEND" if slow else "",
        )


def configs() -> Iterator[Finding]:
    """Which tuned configs there are, in the order in which they are asked."""
    from ..configs.files import SHIPPED, user_folder

    topic = "Tuned configs"
    for whose, folder in (("yours", user_folder()), ("shipped", SHIPPED)):
        devices = sorted({path.parent.name for path in Path(folder).glob("*/*.json")})
        for device in devices:
            yield Finding(topic, "ok", f"{whose}: {device}, {len(list(Path(folder).glob(f'{device}/*.json')))} kernels")
        if not devices:
            yield Finding(topic, "note", f"{whose}: none in {folder}")


def process_groups() -> Iterator[Finding]:
    """Back ends of torch.distributed."""
    import torch
    import torch.distributed as dist

    topic = "Process groups"
    if not dist.is_available():
        yield Finding(topic, "problem", "torch.distributed is not there", "install a torch that was built with it")
        return
    there = {"nccl": dist.is_nccl_available(), "gloo": dist.is_gloo_available()}
    yield Finding(topic, "ok", "torch.distributed with " + ", ".join(name for name, has in there.items() if has))
    if torch.cuda.is_available() and not there["nccl"]:
        yield Finding(
            topic, "problem", "there is a GPU but no NCCL: gloo moves everything through the host", "use Linux"
        )
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        if variable in os.environ:
            yield Finding(topic, "ok", f"{variable}={os.environ[variable]}")


def traps() -> Iterator[Finding]:
    """What makes results slow or wrong without an error."""
    import torch

    topic = "Known traps"
    found = list(_environment_traps(torch.cuda.is_available()))
    if _installed("liger_kernel"):
        text = (
            "Liger is installed: apply_liger_kernel_to_...(swiglu=True) replaces a model's experts, so that "
            'set_experts_implementation("relibra") has nothing to set'
        )
        found.append(Finding(topic, "note", text, "apply Liger with swiglu=False before the model is made"))
    if _installed("megatron.core"):
        text = "Megatron is installed: with moe_router_fusion its router skips RouterReplay without a word"
        found.append(Finding(topic, "note", text, "set moe_router_fusion=False; our adapter refuses it"))
    if torch.cuda.is_available() and not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        text = "there is no C compiler, which Triton needs to launch kernels"
        found.append(Finding(topic, "problem", text, "install gcc"))
    yield from found or [Finding(topic, "ok", "none is set")]


def _environment_traps(gpu: bool) -> Iterator[Finding]:
    topic = "Known traps"
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield Finding(
            topic,
            "problem" if gpu else "note",
            "TRITON_INTERPRET=1 is set: kernels run in Triton's interpreter, thousands of times slower, and its bf16 "
            "arithmetic is wrong",
            "unset TRITON_INTERPRET; it is for tests",
        )
    from ..configs.interpreter import interpreter_fault

    if interpreter_fault():
        used = os.environ.get("TRITON_INTERPRET") == "1"
        yield Finding(topic, "problem" if used else "note", interpreter_fault(), "only tests without a GPU need it")
    if os.environ.get("RELIBRA_DEBUG") == "1":
        yield Finding(
            topic, "note", "RELIBRA_DEBUG=1 is set: every launch checks its ids", "unset RELIBRA_DEBUG to train"
        )
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        yield Finding(topic, "problem", "CUDA_LAUNCH_BLOCKING=1 is set: nothing overlaps", "unset it to train")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version: (2, 13, 0) of "2.13.0+cpu"."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version.split("+")[0])[:3])


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
