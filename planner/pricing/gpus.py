"""The one table of GPUs: what configs are shipped for, what the tuner ranks by, and what plans are priced for."""

import re
from dataclasses import dataclass

from ..errors import one_of


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU. Per clock unless a unit is named; an SM is a compute unit on AMD.

    Attributes:
        name: also the folder of its configs. words: other GPUs of the same chip, as they appear in torch's names.
        target: whose limits hold (`configs.limits.DEVICES`).
        sms, hertz: how many SMs at which boost clock.
        fma: dense 16-bit multiply-adds an SM; unit: what feeds them, which decides how often a tile is read from shared
            memory ("warp": registers; "warpgroup": 64 rows at a time; "tensor_memory": 128 rows at a time).
        shared: bytes from or to shared memory, an SM.
        l2: bytes from the cache that all SMs share, all of them together; l2_bytes: its size.
        dram: bytes a second.
        latency: clocks from asking for a tile to having it.
        fast_bandwidth, slow_bandwidth: nominal bytes a second in one direction, to the other GPUs of its node and, its
            share of the node's network, to other nodes.
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
    fast_bandwidth: float
    slow_bandwidth: float

    @property
    def peak_flops(self) -> float:
        """Dense 16-bit FLOP/s."""
        return 2.0 * self.sms * self.hertz * self.fma


_MIB = 1 << 20
# SMs, clocks, tensor rates, cache sizes and DRAM: the vendors' data sheets and architecture papers (A100: 5120 bytes a
# clock from L2 as well). Assumed: Hopper's L2 rate is Ampere's and Blackwell's twice it; 128 bytes a clock of LDS;
# MI300's and MI350's shared cache is the Infinity Cache, 17.2 TB/s; all latencies. Links: NVLink 3, 4 and 5 are 600,
# 900 and 1800 GB/s in both directions together, Infinity Fabric 7 links of 64 (MI355X: 76.8) GB/s in each; the network
# is 400 Gb/s a GPU (A100: 200).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "A100", ("A800",), "sm_80", 108, 1.41e9, 1024, "warp", 128, 5120, 40 * _MIB, 2.04e12, 700, 300e9, 25e9
        ),
        Gpu(
            "H100", ("H800", "GH200"), "sm_90", 132, 1.83e9, 2048, "warpgroup", 128, 5120, 50 * _MIB, 3.35e12, 800,
            450e9, 50e9,
        ),
        Gpu(
            "H200", (), "sm_90", 132, 1.83e9, 2048, "warpgroup", 128, 5120, 50 * _MIB, 4.8e12, 800, 450e9, 50e9
        ),
        Gpu(
            "B200", ("GB200", "B300", "GB300"), "sm_100", 148, 1.85e9, 4096, "tensor_memory", 128, 10240, 126 * _MIB,
            8e12, 900, 900e9, 50e9,
        ),
        Gpu(
            "MI300X", ("MI325X",), "gfx942", 304, 2.1e9, 1024, "warp", 128, 8190, 256 * _MIB, 5.3e12, 1000,
            448e9, 50e9,
        ),
        Gpu(
            "MI355X", ("MI350X",), "gfx950", 256, 2.4e9, 2048, "warp", 128, 7170, 256 * _MIB, 8e12, 1000,
            537.6e9, 50e9,
        ),
    )
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, in upper or lower case."""
    return GPUS[one_of("device", name, GPUS, ", or auto for the GPU that is here")]


def listed_gpu(torch_name: str) -> Gpu | None:
    """The GPU of this chip, by torch's name of it; None where none is listed."""
    words = set(re.split(r"[^A-Za-z0-9]+", torch_name))
    return next((gpu for gpu in GPUS.values() if words & {gpu.name, *gpu.words}), None)


# The configs of another target serve: limits, and rates of 16-bit types and of memory, are the same
_RELATIVES = {"sm_103": "sm_100"}


def gpu_of(torch_name: str, target: str) -> str:
    """Whose configs a GPU gets, by torch's name of it; its own name, made safe for a folder, where none is listed."""
    gpu = listed_gpu(torch_name)
    if gpu is not None and gpu.target in (target, _RELATIVES.get(target)):
        return gpu.name
    return re.sub(r"[^A-Za-z0-9.]+", "-", torch_name).strip("-.") or target
