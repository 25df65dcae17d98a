"""The machines that plans are priced for: a GPU, its part of the two networks, and what of its rates is achieved."""

from dataclasses import dataclass, replace

from ..errors import one_of
from .gpus import GPUS, listed_gpu

DEFAULT_DEVICE = "8xH100"


@dataclass(frozen=True)
class DeviceSpec:
    """Achieved rates of one GPU and its share of the networks; bytes and FLOP a second, in one direction.

    Attributes:
        grouped_flops: FLOP a second of grouped GEMMs. dense_flops: of attention and shared experts.
        hbm: bytes a second that the GPU's own memory gives.
        fast, slow: bytes a second of its network inside a node, and of that between nodes.
        launch_fast, launch_slow: seconds that one all-to-all takes without any bytes, inside a node and between nodes.
        contention: a transfer that runs beside compute delays it by this part of the transfer's time.
        transfer_launch: seconds that such a transfer takes without any bytes, with the work on both sides.
        layer_seconds: fixed host and device work of a layer and micro-batch.
        slot_seconds: the same of each expert with rows; 0 where one launch takes all experts.
        memory: bytes of the device.
    """

    name: str
    grouped_flops: float
    dense_flops: float
    hbm: float
    fast: float
    slow: float
    launch_fast: float = 25e-6
    launch_slow: float = 60e-6
    contention: float = 0.1
    transfer_launch: float = 20e-6
    layer_seconds: float = 250e-6
    slot_seconds: float = 0.0
    memory: float = 80e9


# Part of the nominal rate that is achieved. Compute: SonicMoE's figures on H100, 430-597 of 989 TFLOP/s for grouped
# GEMMs and full layers. Networks: DeepEP V1's 153-158 of 160 GB/s on H800's NVLink and 43 of 50 on its network at
# EP16; NCCL's usual 0.78 of NVLink on H100. Launches and contention are assumed.
_GROUPED, _DENSE, _HBM, _FAST, _SLOW = 0.55, 0.5, 0.75, 0.78, 0.84
_MEMORY = {"A100": 80e9, "H100": 80e9, "H200": 141e9, "B200": 180e9, "MI300X": 192e9, "MI355X": 288e9}

DEVICES = {
    f"8x{gpu.name}": DeviceSpec(
        name=f"8x{gpu.name}",
        grouped_flops=gpu.peak_flops * _GROUPED,
        dense_flops=gpu.peak_flops * _DENSE,
        hbm=gpu.dram * _HBM,
        fast=gpu.fast_bandwidth * _FAST,
        slow=gpu.slow_bandwidth * _SLOW,
        memory=_MEMORY[gpu.name],
    )
    for gpu in GPUS.values()
}
# Ranks on one machine's cores over gloo: the best of many runs on two busy cores of a Xeon, one thread a rank
# (measured).
DEVICES["CPU"] = DeviceSpec(
    name="CPU",
    grouped_flops=60e9,
    dense_flops=60e9,
    hbm=14e9,
    fast=0.7e9,
    slow=0.7e9,
    launch_fast=85e-6,
    launch_slow=85e-6,
    contention=1.0,
    transfer_launch=1e-3,
    layer_seconds=1e-3,
    slot_seconds=2e-4,
    memory=8e9,
)
DEVICES["NVL72"] = replace(DEVICES["8xB200"], name="NVL72", memory=186e9)


def find_device(text: str) -> DeviceSpec:
    """The machine of this name in upper or lower case; a GPU's name alone is a node of eight of them."""
    eight = f"8x{text}".lower()
    return DEVICES[one_of("device", text if eight not in map(str.lower, DEVICES) else eight, DEVICES)]


def machine_of(torch_name: str) -> DeviceSpec | None:
    """The node of eight of the GPU that torch calls so; None where that is not listed."""
    gpu = listed_gpu(torch_name)
    return None if gpu is None else find_device(gpu.name)
