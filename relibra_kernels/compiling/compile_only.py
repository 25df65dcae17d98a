"""Compile a recorded launch for a GPU that is not here, and read off what it needs.

Registers, spills, shared memory and instructions are facts about the machine code, not estimates.
"""

import hashlib
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..configs.config import accumulators
from ..configs.limits import Device
from ..configs.versions import version_of
from ..kernels.launch import Launch
from ..planner.errors import InputError
from .known_bugs import known_bug
from .machine_code import MachineCode, read_machine_code

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_READS_SM_103 = (3, 7)  # the first Triton whose cuobjdump does
_GRAD_WEIGHT_ROWS = 4096  # of a slot, where the epilogue of a weight gradient is compared with its main loop
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# fifth-generation, warpgroup and warp matrix products; AMD's matrix cores
_MMA = re.compile(r"\b(UTC[A-Z]*MMA|[A-Z]GMMA|[HID]MMA|v_mfma_\w+)\b")


class Instructions(NamedTuple):
    """The matrix instruction, how many loads there are of which kind, and the figures of the main loop."""

    mma: str | None = None
    tma: int = 0
    async_copies: int = 0
    code: MachineCode = MachineCode()


@dataclass(frozen=True)
class Report:
    """What one compiled launch needs: spilled bytes a thread, how many load instructions of which kind, and its loop.

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
    code: MachineCode


def compile_launch(launch: Launch, device: Device, *, instructions: bool = True, dump: Path | None = None) -> Report:
    """Compile `launch` for `device` with the specialisation that a real launch would get.

    Args:
        instructions: read the machine code; without, `mma`, `tma`, `async_copies` and `code` stay empty.
        dump: a folder to keep the compilation's texts in.
    """
    if triton.knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET is 1; compiling needs a process without it")
    if device.name == "sm_103" and version_of("triton") < _READS_SM_103:
        raise InputError(
            f"target is sm_103, whose code the cuobjdump of Triton {triton.__version__} cannot read; use 3.7"
        )
    signature, constants, attrs, options = specialised(launch)
    target = GPUTarget(device.backend, device.arch, device.warp_size)
    if device.backend == "hip":  # as Triton does at a launch: loads of tensors below 2 GiB become buffer loads
        for place, given in enumerate(launch.args):
            if isinstance(given, torch.Tensor) and given.numel() * given.element_size() < 2**31:
                attrs[(place,)] = [*attrs.get((place,), []), ["tt.pointer_range", 32]]
    source = ASTSource(launch.kernel, signature, constants, attrs)
    compiled = triton.compile(source, target=target, options=options)
    found = Instructions()
    if instructions or dump is not None:
        texts, meta = _texts(compiled, device), _meta(launch, compiled, device)
        usage, found = texts.get("usage", ""), _instructions(texts, meta)
        if dump is not None:
            _dump(dump, texts, meta)
    elif device.backend == "cuda":
        usage = _usage(compiled.asm["cubin"])
    registers, spill = _read_usage(usage) if device.backend == "cuda" else _read_needs(compiled.asm["amdgcn"])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    by_registers = device.registers_per_sm // (device.warp_size * max(registers, 1)) // warps
    by_shared = device.shared_bytes // shared if shared else by_registers
    return Report(
        kernel=_name(launch),
        registers=registers,
        spill_bytes=spill,
        shared_bytes=shared,
        stages=compiled.metadata.num_stages,
        warps=warps,
        mma=found.mma,
        tma=found.tma,
        async_copies=found.async_copies,
        warps_per_sm=min(device.warps_per_sm // warps, by_registers, by_shared) * warps,
        known_bug=known_bug(compiled.asm["ttir"], constants, device),
        code=found.code,
    )


def _instructions(texts: dict[str, str], meta: dict[str, Any]) -> Instructions:
    text = texts.get("sass") or texts["amdgcn"]
    if "sass" in texts:
        opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", text, re.MULTILINE)
        mma = next((match.group(1) for match in map(_MMA.search, opcodes) if match), None)
        tma, copies = sum(o.startswith("UTMALDG") for o in opcodes), sum(o == "LDGSTS" for o in opcodes)
    else:
        found = _MMA.search(text)
        mma, tma = found.group(1) if found else None, 0
        copies = len(re.findall(r"\b(?:buffer|global)_load_\w*lds\w*|_lds\b", text))
    return Instructions(mma, tma, copies, read_machine_code(texts, meta))


def launch_digest(launch: Launch) -> str:
    """A digest of everything that decides what is compiled for a launch on a target."""
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


def _texts(compiled: Any, device: Device) -> dict[str, str]:
    """What a compilation left, by kind: `ttgir`, `ptx`, `sass` and `usage`, or `ttgir` and `amdgcn`."""
    if device.backend != "cuda":
        return {"ttgir": compiled.asm["ttgir"], "amdgcn": compiled.asm["amdgcn"]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        sass, usage = _cuobjdump("-sass", path), _cuobjdump("-res-usage", path)
    return {"ttgir": compiled.asm["ttgir"], "ptx": compiled.asm["ptx"], "sass": sass, "usage": usage}


def _meta(launch: Launch, compiled: Any, device: Device) -> dict[str, Any]:
    """What `machine_code` has to know of a compilation besides its texts."""
    kernel, options = _name(launch), launch.options
    blocks = {name: options.get(name, 0) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    first = next(argument for argument in launch.args if isinstance(argument, torch.Tensor))
    return {
        "target": device.name,
        "kernel": kernel,
        "num_warps": options.get("num_warps", compiled.metadata.num_warps),  # without those that are specialised
        "num_stages": compiled.metadata.num_stages,
        **blocks,
        "dtype_bytes": first.element_size(),
        "accumulators": accumulators(kernel),
        "shared_bytes": compiled.metadata.shared,
        "K": _GRAD_WEIGHT_ROWS if kernel == "grad_weight" else options.get("D"),
        "persistent": blocks["BLOCK_K"] > 0,
        "triton": triton.__version__,
    }


def _name(launch: Launch) -> str:
    return launch.kernel.__name__.strip("_").removesuffix("_kernel")


def _dump(folder: Path, texts: dict[str, str], meta: dict[str, Any]) -> None:
    """One file a kind, named by it: what `machine_code` reads, for later."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, text in {**texts, "json": json.dumps(meta, indent=2)}.items():
        (folder / kind).write_text(text, encoding="utf-8")


def _read_usage(usage: str) -> tuple[int, int]:
    """(registers, spilled bytes) a thread."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    return int(found.group(1)), int(found.group(2)) + int(found.group(3))


def _read_needs(assembly: str) -> tuple[int, int]:
    """(registers, spilled bytes) a thread, from AMD's assembly. Vector and accumulation registers are halves of 512."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return max(field("vgpr_count"), 1), 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))


def _usage(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return _cuobjdump("-res-usage", path)


@cache
def _cuobjdump_path() -> str:
    return triton.knobs.nvidia.cuobjdump.path


def _cuobjdump(flag: str, path: Path) -> str:
    return subprocess.run([_cuobjdump_path(), flag, str(path)], check=True, capture_output=True, text=True).stdout
