"""Does anything run: versions, the device's peaks, all that is to be compiled, every kernel once, the sanitizer."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .case import CRASHED, MISSING, NOT_COMPILED, TIMEOUT, WRONG, Case, Missing, Wrong

if TYPE_CHECKING:
    from .setting import Setting

REHEARSED = ("permute", "grouped_gemm")
SLICES = 6  # processes that compile at once
KERNELS = ("schedule", "permute", "gate_up", "swiglu", "grouped_gemm", "grad_hidden", "grad_weight", "grad_bias",
           "replica_reduce")  # fmt: skip
COMPILED = {"TRITON_INTERPRET": "0", "RELIBRA_BACKEND": ""}  # also in a rehearsal
_SMI = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,clocks_throttle_reasons.active"


def cases(rehearse: bool) -> list[Case]:
    found = [
        Case("versions", "versions", seconds=60),
        Case("peaks", "peaks", seconds=40),
        *(
            Case(
                f"compile {i + 1} of {SLICES}",
                "compile_slice",
                {"index": i},
                150,
                beside=True,
                env=COMPILED,
                rehearsed=i < 2,
            )
            for i in range(SLICES)
        ),
        *(
            Case(f"kernel {kernel}", "run_kernel", {"kernel": kernel}, 60, beside=True, rehearsed=kernel in REHEARSED)
            for kernel in KERNELS
        ),
        *(
            Case(f"sanitizer {tool}", "sanitize", {"tool": tool}, 120, beside=True, may_miss=True)
            for tool in ("memcheck", "racecheck")
        ),
    ]
    return found + (DELIBERATE if rehearse else [])


DELIBERATE = [
    Case("deliberate crash", "crash", seconds=20, expect=CRASHED),
    Case("deliberate hang", "hang", seconds=2, expect=TIMEOUT),
    Case("deliberate compiler error", "not_compiling", seconds=40, env=COMPILED, expect=NOT_COMPILED),
    Case("deliberate compiler crash", "crash_of_a_compiler", seconds=20, expect=NOT_COMPILED),
    Case("deliberate error", "wrong", seconds=20, expect=WRONG),
    Case("deliberate lack", "lacking", seconds=20, expect=MISSING),
]


def versions(setting: Setting) -> None:
    """What is installed, and what `relibra doctor` says of it."""
    import importlib.metadata

    import torch

    found = {"python": sys.version.split()[0], "cuda": torch.version.cuda or "none", "cores": os.cpu_count()}
    for name in ("torch", "triton", "numpy", "transformers", "accelerate", "liger_kernel", "scattermoe", "sonicmoe"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not there"
    setting.report.figures(**found)
    if not setting.rehearse:
        properties = torch.cuda.get_device_properties(0)
        setting.report.figures(
            sms=properties.multi_processor_count,
            memory_gib=properties.total_memory / 2**30,
            l2_mib=properties.L2_cache_size / 2**20,
            capability=f"{properties.major}.{properties.minor}",
            nvcc=shutil.which("nvcc") or "not there",
            gcc=shutil.which("gcc") or shutil.which("cc") or "not there",
            driver=_smi("driver_version"),
        )
    doctor = subprocess.run(
        [sys.executable, "-m", "relibra_kernels", "doctor", "--json"], capture_output=True, text=True, timeout=50
    )
    findings = json.loads(doctor.stdout)
    problems = [finding["text"] for finding in findings if finding["level"] == "problem"]
    setting.report.figures(doctor_findings=len(findings), doctor_problems=problems)


def _smi(query: str) -> str:
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=15).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi is not there"


def peaks(setting: Setting) -> None:
    """What this device can do: a bf16 matmul, a copy, and its state right after them."""
    import torch

    size, count = setting.size(8192, 64), setting.size(1 << 31, 1 << 16)
    a, b = (setting.randn(size, size) for _ in range(2))
    matmul = setting.clock.of([lambda: a @ b], seconds=1.0)
    after = _smi(_SMI)
    source, into = torch.ones(count, dtype=torch.int8, device=setting.device), None
    into = torch.empty_like(source)
    copy = setting.clock.of([lambda: into.copy_(source)], seconds=0.3)
    wide = setting.randn(setting.size(32768, 64), setting.size(2048, 32))
    narrow = setting.randn(setting.size(2048, 32), setting.size(1536, 32))
    gemm = setting.clock.of([lambda: wide @ narrow], seconds=0.3)
    setting.report.figures(
        matmul_tflops=2 * size**3 / matmul.median / 1e12,
        matmul_spread=matmul.spread,
        moe_shaped_matmul_tflops=2 * wide.numel() * narrow.shape[1] / gemm.median / 1e12,
        copy_tbs=2 * count / copy.median / 1e12,
        copy_spread=copy.spread,
        clocks_power_temperature=after,
    )


def compile_slice(setting: Setting, index: int) -> None:
    """Every n-th launch of what the stages that follow run, into Triton's cache: all cores are at it together."""
    import time

    from relibra_kernels.compiling.precompiling import compile_for, compile_on
    from relibra_kernels.configs.limits import device_for, device_of
    from relibra_kernels.configs.products import PRODUCTS

    from .ahead import launches_ahead

    target = device_for(PRODUCTS["H100"]) if setting.rehearse else device_of(setting.device)
    launches = launches_ahead(target, setting.rehearse)
    mine = launches[index::SLICES][: setting.size(len(launches), 2)]
    jobs = max(1, (os.cpu_count() or 1) // SLICES)
    begun = time.monotonic()
    with setting.report.compiling(f"slice {index}"):
        if setting.rehearse:
            compile_for(target, mine, jobs)
        else:
            compile_on(setting.device, mine, jobs)
    setting.report.figures(launches=len(mine), of=len(launches), compile_seconds=time.monotonic() - begun, jobs=jobs)


def run_kernel(setting: Setting, kernel: str) -> None:
    """One kernel with all its parts, in two forms: it runs, and what it writes is finite."""
    import torch

    from .problems import copies, layer_of, model_of, outputs, parts_of, uneven

    ran = 0
    for name in ("Qwen3-30B-A3B", "gpt-oss-120b"):
        model = model_of(setting, name)
        slots, rows = setting.size((8, 1000), (4, 12))
        for replicas in (0, 2):
            layer = layer_of(setting, model, uneven(slots, rows), replicas=replicas, accumulate=replicas > 0)
            for of, part in parts_of(model, kernel):
                for what, tensor in outputs(copies(layer.call(of, part, None))).items():
                    used = tensor[: int(layer.schedule.slot_offsets[-1])] if what.startswith("out") else tensor
                    if not bool(torch.isfinite(used.float()).all()):
                        raise Wrong(f"{of} {part} of {name}, {replicas} replicas: {what} is not finite")
                ran += 1
    if not ran:
        raise Missing(f"no layer has a kernel {kernel}")
    setting.synchronize()
    setting.report.figures(calls=ran)


def sanitize(setting: Setting, tool: str) -> None:
    """compute-sanitizer over one tiny layer, forward and backward."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise Missing("compute-sanitizer is not there")
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", tool, "--print-limit", "5", sys.executable, "-m", "gpu_stages.tiny_layer"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=115)
    text = done.stdout + done.stderr
    found = re.search(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    if found is None or "Device not supported" in text:
        raise Missing(f"{tool} does not work here: {text[-500:]}")
    count = int(found.group(1) or found.group(2))
    setting.report.figures(errors=count, output=text[-400:])
    if count:
        raise Wrong(f"{tool} found {count}: {text[:1000]}")


def crash(setting: Setting) -> None:
    import ctypes

    setting.report.figures(begun=1)
    ctypes.string_at(0)


def hang(setting: Setting) -> None:
    import signal
    import time

    setting.report.figures(begun=1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)


def not_compiling(setting: Setting) -> None:
    """A kernel that Triton refuses."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from .refused import refused_kernel

    compile_kernel(ASTSource(refused_kernel, {"x_ptr": "*fp32"}), target=GPUTarget("cuda", 90, 32))


def crash_of_a_compiler(setting: Setting) -> None:
    with setting.report.compiling("a kernel"):
        os.abort()


def wrong(setting: Setting) -> Any:
    setting.report.figures(relative_error=1.0)
    raise Wrong("deliberately")


def lacking(setting: Setting) -> None:
    import a_package_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401
