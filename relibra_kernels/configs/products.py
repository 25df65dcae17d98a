"""GPUs by name: what configs are shipped for, and the rates by which the model ranks them."""

import re
from dataclasses import dataclass

from ..planner.errors import InputError


@dataclass(frozen=True)
class Product:
    """Rates of one GPU. Per clock unless a unit is named; an SM is a compute unit on AMD.

    Attributes:
        name: also the folder of its configs. words: other GPUs of the same chip, as they appear in torch's names.
        target: whose limits hold (`limits.DEVICES`).
        sms, hertz: how many SMs at which boost clock.
        fma: dense 16-bit multiply-adds an SM; unit: what feeds them, which decides how often a tile is read from shared
            memory ("warp": registers; "warpgroup": 64 rows at a time; "tensor_memory": 128 rows at a time).
        shared: bytes from or to shared memory, an SM.
        l2: bytes from the cache that all SMs share, all of them together; l2_bytes: its size.
        dram: bytes a second.
        latency: clocks from asking for a tile to having it.
    """

    name: str
    words: tuple[str, ...]
    target: str
    sms: int
    hertz: float
    fma: int
    unit: str
    shared: int
    l2: int
    l2_bytes: int
    dram: float
    latency: int


_MIB = 1 << 20
# SMs, clocks, tensor rates, cache sizes and DRAM: the vendors' data sheets and architecture papers (A100: 5120 bytes a
# clock from L2 as well). Assumed: Hopper's L2 rate is Ampere's and Blackwell's twice it; 128 bytes a clock of LDS;
# MI300's and MI350's shared cache is the Infinity Cache, 17.2 TB/s; all latencies.
PRODUCTS = {
    product.name: product
    for product in (
        Product(
            "A100", ("A800",), "sm_80", 108, 1.41e9, 1024, "warp", 128, 5120, 40 * _MIB, 2.04e12, 700
        ),
        Product(
            "H100", ("H800", "GH200"), "sm_90", 132, 1.83e9, 2048, "warpgroup", 128, 5120, 50 * _MIB, 3.35e12, 800
        ),
        Product("H200", (), "sm_90", 132, 1.83e9, 2048, "warpgroup", 128, 5120, 50 * _MIB, 4.8e12, 800),
        Product(
            "B200", ("GB200",), "sm_100", 148, 1.85e9, 4096, "tensor_memory", 128, 10240, 126 * _MIB, 8e12, 900
        ),
        Product(
            "MI300X", ("MI325X",), "gfx942", 304, 2.1e9, 1024, "warp", 128, 8190, 256 * _MIB, 5.3e12, 1000
        ),
        Product("MI355X", ("MI350X",), "gfx950", 256, 2.4e9, 2048, "warp", 128, 7170, 256 * _MIB, 8e12, 1000),
    )
}  # fmt: skip


def product_named(name: str) -> Product:
    for product in PRODUCTS.values():
        if product.name.lower() == name.lower():
            return product
    raise InputError(f"device is {name!r}; it must be one of {', '.join(PRODUCTS)}, or auto for the GPU that is here")


def product_of(gpu_name: str, target: str) -> str:
    """The product whose configs a GPU gets, by torch's name of it; its own name, made safe, where none is listed."""
    words = set(re.split(r"[^A-Za-z0-9]+", gpu_name))
    for product in PRODUCTS.values():
        if product.target == target and words & {product.name, *product.words}:
            return product.name
    return re.sub(r"[^A-Za-z0-9.]+", "-", gpu_name).strip("-.") or target
