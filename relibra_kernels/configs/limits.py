"""The one place that knows what each device can do."""

from dataclasses import dataclass, replace
from functools import cache

import torch

from ..planner.errors import InputError
from .products import Product, product_of


@dataclass(frozen=True)
class Device:
    """Limits that a kernel's config must respect.

    Attributes:
        backend, arch, warp_size: what Triton's compiler is told.
        shared_bytes: most shared memory (AMD: LDS) that one block may use.
        warps_per_sm: resident warps an SM (AMD: waves a compute unit) can hold.
        family: devices that get the same configs.
        stages_in_registers: how many of a config's stages need no shared memory.
        registers_per_sm: 32-bit registers, over which `warps_per_sm` is shared (AMD: per SIMD lane, 4 SIMDs).
        xcds: chiplets with an L2 cache of their own; blocks are dealt to them in turn.
        tma: has tensor-memory copies; descriptor_gather: also of rows picked by index.
        programs: persistent programs to start: the GPU's number of SMs; 0 where only the architecture is known.
        product: the folder whose configs are looked up, as `planner.pricing.gpus` names GPUs; empty: none.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    warps_per_sm: int
    registers_per_sm: int = 65536
    family: str = "ampere"
    stages_in_registers: int = 0
    xcds: int = 1
    tma: bool = False
    descriptor_gather: bool = False
    programs: int = 0
    product: str = ""
    interpreted: bool = False


_KIB = 1024
_CDNA = 4 * 512 * 64  # 32-bit registers of a compute unit: 4 SIMDs of 64 lanes of 512
DEVICES = {
    device.name: device
    for device in (
        # CUDA C++ programming guide, table of technical specifications per compute capability
        Device("sm_80", "cuda", 80, 32, 163 * _KIB, 64),
        Device("sm_86", "cuda", 86, 32, 99 * _KIB, 48),
        Device("sm_89", "cuda", 89, 32, 99 * _KIB, 48),
        Device("sm_90", "cuda", 90, 32, 227 * _KIB, 64, family="hopper", tma=True),
        Device("sm_100", "cuda", 100, 32, 227 * _KIB, 64, family="blackwell", tma=True, descriptor_gather=True),
        Device("sm_103", "cuda", 103, 32, 227 * _KIB, 64, family="blackwell", tma=True, descriptor_gather=True),
        Device("sm_120", "cuda", 120, 32, 99 * _KIB, 48),
        # CDNA2, 3 and 4 ISA guides: 64, 64 and 160 KiB of LDS, 8 waves a SIMD, 8 XCDs on MI300 and MI350
        Device("gfx90a", "hip", "gfx90a", 64, 64 * _KIB, 32, _CDNA, family="cdna2", stages_in_registers=1),
        Device(
            "gfx942", "hip", "gfx942", 64, 64 * _KIB, 32, 4 * 512 * 64, family="cdna3", stages_in_registers=1, xcds=8
        ),
        Device("gfx950", "hip", "gfx950", 64, 160 * _KIB, 32, 4 * 512 * 64, family="cdna4", xcds=8),
    )
}

INTERPRETER = Device("interpreter", "cuda", 0, 32, 227 * _KIB, 64, programs=3, interpreted=True)


def device_named(name: str) -> Device:
    if name not in DEVICES:
        raise InputError(f"target is {name!r}; it must be one of {', '.join(DEVICES)}")
    return DEVICES[name]


def device_for(product: Product) -> Device:
    """The limits of a GPU that need not be here."""
    return replace(DEVICES[product.target], programs=product.sms, product=product.name)


@cache
def device_of(device: torch.device) -> Device:
    """The limits of the GPU that holds a tensor; of the nearest older relative where the table lacks it."""
    if device.type != "cuda":
        raise InputError(f"the tensors are on {device}; the kernels need a CUDA or ROCm device")
    properties = torch.cuda.get_device_properties(device)
    programs = properties.multi_processor_count
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        known = [d for d in DEVICES.values() if d.backend == "hip"]
        older = [d for d in known if name.startswith("gfx9") and _number(d.name) <= _number(name)]
        if not older:  # no compute GPU, or one without the products of bf16
            raise InputError(f"the GPU is a {name}; the kernels know {', '.join(d.name for d in known)}")
        nearest = max(older, key=lambda d: _number(d.name))
        return replace(nearest, arch=name, programs=programs, product=product_of(properties.name, nearest.name))
    capability = properties.major * 10 + properties.minor
    # Within a major version code runs on later minors; 110 and 121 are relatives of 103 and 120.
    older = [d for d in DEVICES.values() if d.backend == "cuda" and isinstance(d.arch, int) and d.arch <= capability]
    if not older:
        raise InputError(
            f"the GPU has compute capability {properties.major}.{properties.minor}; it must be 8.0 or newer"
        )
    nearest = max(older, key=lambda d: int(d.arch))
    same_family = int(nearest.arch) // 10 == capability // 10
    return replace(
        nearest,
        arch=capability,
        programs=programs,
        product=product_of(properties.name, nearest.name),
        descriptor_gather=nearest.descriptor_gather and same_family,
        shared_bytes=min(
            nearest.shared_bytes, getattr(properties, "shared_memory_per_block_optin", nearest.shared_bytes)
        ),
    )


def _number(gfx: str) -> int:
    """AMD's architectures are numbered in hexadecimal."""
    return int(gfx.removeprefix("gfx"), 16)
