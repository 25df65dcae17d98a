"""Compile a recorded launch for a GPU that is not here, and read off what it needs.

Registers, spills, shared memory and instructions are facts about the machine code, not estimates.
"""

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..configs.limits import Device
from ..kernels.launch import Launch
from ..planner.errors import InputError
from .known_bugs import known_bug

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# fifth-generation, warpgroup and warp matrix products; AMD's matrix cores
_MMA = re.compile(r"\b(UTC[A-Z]*MMA|[A-Z]GMMA|[HID]MMA|v_mfma_\w+)\b")


@dataclass(frozen=True)
class Report:
    """What one compiled launch needs: spilled bytes a thread, and how many load instructions of which kind.

    `known_bug` says which bug of Triton its program meets; empty where none is known.
    """

    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    stages: int
    warps: int
    mma: str | None
    tma: int
    async_copies: int
    warps_per_sm: int
    known_bug: str


def compile_launch(launch: Launch, device: Device, *, instructions: bool = True) -> Report:
    """Compile `launch` for `device` with the specialisation that a real launch would get.

    Without `instructions` the machine code is not read: `mma`, `tma` and `async_copies` stay empty.
    """
    if triton.knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET is 1; compiling needs a process without it")
    signature, constants, attrs, options = specialised(launch)
    target = GPUTarget(device.backend, device.arch, device.warp_size)
    source = ASTSource(launch.kernel, signature, constants, attrs)
    compiled = triton.compile(source, target=target, options=options)
    if device.backend == "cuda":
        facts = _read_cubin(compiled.asm["cubin"], instructions)
    else:
        facts = _read_amdgcn(compiled.asm["amdgcn"])
    registers, warps = facts["registers"], compiled.metadata.num_warps
    by_registers = device.registers_per_sm // (device.warp_size * max(registers, 1)) // warps
    by_shared = device.shared_bytes // compiled.metadata.shared if compiled.metadata.shared else by_registers
    return Report(
        kernel=launch.kernel.__name__.strip("_").removesuffix("_kernel"),
        shared_bytes=compiled.metadata.shared,
        stages=compiled.metadata.num_stages,
        warps=warps,
        warps_per_sm=min(device.warps_per_sm // warps, by_registers, by_shared) * warps,
        known_bug=known_bug(compiled.asm["ttir"], constants, device),
        **facts,
    )


def launch_digest(launch: Launch) -> str:
    """Names exactly what is compiled for a launch, on any one target."""
    what = (launch.kernel.cache_key, *specialised(launch))
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[object]]], dict]:
    """(signature, constants, attributes, options) of a launch: two launches with equal ones are compiled once."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attrs: dict[tuple[int], list[list[object]]] = {}
    for place, parameter in enumerate(kernel.params):
        given = launch.args[place] if place < len(launch.args) else launch.options[parameter.name]
        signature[parameter.name] = kind = _kind(given, parameter)
        if kind == "constexpr":
            constants[parameter.name] = given
        elif _is_aligned(given, parameter):
            attrs[(place,)] = [["tt.divisibility", 16]]
    options = {name: launch.options[name] for name in _OPTIONS if name in launch.options}
    return signature, constants, attrs, options


def _is_aligned(given: Any, parameter: triton.runtime.jit.KernelParam) -> bool:
    """Whether the kernel is compiled for a multiple of 16: of a tensor's address, or of an integer."""
    if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
        return False
    return (given.data_ptr() if isinstance(given, torch.Tensor) else given) % 16 == 0


def _kind(given: object, parameter: triton.runtime.jit.KernelParam) -> str:
    if parameter.is_constexpr or given is None:
        return "constexpr"
    if isinstance(given, torch.Tensor):
        return "*" + _TYPES[given.dtype]
    if isinstance(given, int):
        if given == 1 and not parameter.do_not_specialize:
            return "constexpr"
        return "i32" if -(2**31) <= given < 2**31 else "i64"
    raise InputError(
        f"argument {parameter.name} is a {type(given).__name__}; a launch takes tensors, integers and None"
    )


def _read_cubin(cubin: bytes, instructions: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("-res-usage", path)
        sass = _cuobjdump("-sass", path) if instructions else ""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", sass, re.MULTILINE)
    mma = next((match.group(1) for match in map(_MMA.search, opcodes) if match), None)
    return {
        "registers": int(found.group(1)),
        "spill_bytes": int(found.group(2)) + int(found.group(3)),
        "mma": mma,
        "tma": sum(opcode.startswith("UTMALDG") for opcode in opcodes),
        "async_copies": sum(opcode == "LDGSTS" for opcode in opcodes),
    }


def _read_amdgcn(assembly: str) -> dict:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    mma = _MMA.search(assembly)
    return {
        # vector and accumulation registers are halves of one file of 512
        "registers": max(field("vgpr_count"), 1),
        "spill_bytes": 4 * (field("vgpr_spill_count") + field("sgpr_spill_count")),
        "mma": mma.group(1) if mma else None,
        "tma": 0,
        "async_copies": len(re.findall(r"\b(?:buffer|global)_load_\w*lds\w*|_lds\b", assembly)),
    }


@cache
def _cuobjdump_path() -> str:
    return triton.knobs.nvidia.cuobjdump.path


def _cuobjdump(flag: str, path: Path) -> str:
    return subprocess.run([_cuobjdump_path(), flag, str(path)], check=True, capture_output=True, text=True).stdout
