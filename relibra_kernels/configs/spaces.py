"""The configs that each kernel may be given, the ones for large batches first, and what a search tries besides."""

import torch

from .config import GEMM_KERNELS, BlockConfig, Config, GemmConfig, accumulators, misfit, parse_config
from .limits import Device


def _all(text: str) -> list[Config]:
    return [parse_config(config) for config in text.split()]


# kernel -> the configs that a launch gets without a search, for 2-byte types
SPACE = {
    "gate_up": _all(  # computes twice block_n columns
        "128x128x64w8s3 128x64x64w8s4 128x64x64w8s2 64x128x64w8s3 64x64x64w4s3 64x64x64w4s2 64x32x32w4s2"
    ),
    "grouped_gemm": _all(
        "128x256x64w8s3 128x128x64w8s4 128x128x64w8s3 128x128x64w8s2 128x128x32w8s2 64x128x64w4s4 64x128x64w4s2 "
        "64x64x32w4s2"
    ),
    "grad_hidden": _all(
        "128x256x64w8s3 128x128x64w8s3 128x128x64w8s2 128x64x64w8s3 64x128x64w8s3 64x128x64w8s2 64x64x64w4s3 "
        "64x64x32w4s2"
    ),
    "grad_weight": _all(
        "128x256x64w8s3 128x128x64w8s3 128x128x64w8s2 128x128x32w8s3 64x128x64w8s3 64x128x64w4s2 64x64x32w4s2"
    ),
    "permute": _all("1024w4"),
    "swiglu": _all("1024w4"),
    "replica_reduce": _all("4096w4"),
    "grad_bias": _all("32x128w4"),
    "schedule": _all("1024w4 4096w8"),
}

# fp32 is exact and slow: no tensor cores
SPACE_FP32 = {
    "gate_up": _all("64x32x32w4s2"),
    "grouped_gemm": _all("64x64x32w4s2"),
    "grad_hidden": _all("64x64x32w4s2"),
    "grad_weight": _all("64x64x32w4s2 32x32x32w4s2"),
}

# (family, kernel) -> configs for 2-byte types that spill registers or need more shared memory than there is, as
# `relibra compile` shows
EXCLUDED: dict[tuple[str, str], list[Config]] = {
    ("ampere", "gate_up"): _all("128x128x64w8s3"),
    ("ampere", "grad_hidden"): _all("128x256x64w8s3"),
    ("ampere", "grad_weight"): _all("128x256x64w8s3"),
    ("cdna4", "grad_hidden"): _all("128x256x64w8s3"),
    ("cdna4", "grad_weight"): _all("128x256x64w8s3"),
    ("blackwell", "gate_up"): _all("128x128x64w8s3 64x64x64w4s3 64x32x32w4s2"),  # the small ones under Triton 3.7
    ("blackwell", "grouped_gemm"): _all("64x64x32w4s2"),
    ("blackwell", "grad_hidden"): _all("64x128x64w8s3 64x64x32w4s2"),  # under Triton 3.6
}

# What a search tries besides. Some of it spills or does not fit on one device or another.
WIDER = {
    "gate_up": _all("128x128x64w8s4 128x64x64w8s3 64x128x64w8s2 64x64x64w4s4"),
    "grouped_gemm": _all(
        "128x256x64w8s4 128x128x64w4s3 64x256x64w8s3 64x128x64w4s3 64x64x64w4s4 "
        "128x256x64w4s4ws 128x256x64w4s3ws 128x128x64w4s4ws"
    ),
    "grad_hidden": _all("128x256x64w8s4 128x128x64w8s4 64x256x64w8s3 64x128x64w4s3 64x64x64w4s4"),
    "grad_weight": _all(
        "128x256x64w8s4 256x128x64w8s3 128x128x64w8s4 128x128x64w8s5 128x128x64w4s2 128x64x64w4s3 64x64x64w4s3"
    ),
    "permute": _all("8192w8 4096w8 4096w4 2048w8 2048w4 1024w2 512w2 512w1"),
    "swiglu": _all("2048w8 2048w4 1024w2 512w2 512w1 256w1"),
    "replica_reduce": _all("16384w8 8192w8 8192w4 4096w8 2048w8 2048w4 1024w4 1024w2"),
    "grad_bias": _all("256x64w8 256x32w8 128x128w8 128x64w8 128x64w4 128x32w4 64x128w4 64x64w4 32x256w4"),
    "schedule": _all("2048w8 2048w4 1024w8 512w4 512w2"),
}
# (family, kernel, interleaved) -> candidates with no fault under the Triton that searches, and one under another that
# is supported (`make compile-matrix`). Weight gradients: on Ampere under 3.9, 256x128 spills 40 bytes, 64x128 spills 8,
# and 128x64 has 20 barriers in a loop; on Hopper under 3.6, 147 bytes of shared memory are moved a matrix clock. The
# others spill 8 bytes.
WORSE_ELSEWHERE: dict[tuple[str, str, bool], list[Config]] = {
    ("ampere", "grad_weight", False): _all("256x128x64w8s3 128x64x64w4s3 64x128x64w8s3"),
    ("ampere", "grad_weight", True): _all("256x128x64w8s3 128x64x64w4s3 64x128x64w8s3"),
    ("hopper", "grad_weight", False): _all("256x128x64w8s3"),
    ("hopper", "grad_weight", True): _all("256x128x64w8s3"),
    ("ampere", "gate_up", True): _all("128x128x64w8s3"),
    ("ampere", "grad_hidden", True): _all("128x256x64w8s3"),
}
_MOST_ACCUMULATORS = 160  # fp32 a thread; beyond it everything spills

_INTERPRETED = {"schedule": BlockConfig(64, 4)}  # several blocks also where a test has few tokens
_INTERPRETED_GEMM = GemmConfig(16, 16, 16, 4, 1)
_MANY_ASSIGNMENTS = 1 << 20  # from here on schedule's second config: one program scans over all blocks


def configs(kernel: str, device: Device, dtype: torch.dtype) -> list[Config]:
    """What `kernel` may be given on `device`: everything here compiles without spills and fits."""
    if device.interpreted:
        return [_INTERPRETED_GEMM if kernel in GEMM_KERNELS else _INTERPRETED.get(kernel, SPACE[kernel][0])]
    space, excluded = SPACE[kernel], EXCLUDED.get((device.family, kernel), [])
    if dtype == torch.float32 and kernel in SPACE_FP32:
        space, excluded = SPACE_FP32[kernel], []
    return [config for config in space if config not in excluded and not misfit(kernel, config, device, dtype)]


def candidates(kernel: str, device: Device, dtype: torch.dtype) -> list[Config]:
    """What a search tries: all that fits by its sizes. What spills is known when it is compiled."""
    fp32 = dtype == torch.float32 and kernel in SPACE_FP32
    space = SPACE_FP32[kernel] if fp32 else SPACE[kernel] + WIDER[kernel]

    def is_hopeless(config: Config) -> bool:
        if isinstance(config, BlockConfig) or config.is_specialised:  # accumulators in tensor memory, stored in halves
            return False
        elements = accumulators(kernel) * config.block_m * config.block_n
        return elements // (config.num_warps * device.warp_size) > _MOST_ACCUMULATORS

    return [config for config in space if not is_hopeless(config) and not misfit(kernel, config, device, dtype)]


def config_for(kernel: str, device: Device, dtype: torch.dtype, num_rows: int, num_slots: int) -> Config:
    """A config always, at once, without a search: small row tiles where slots have few rows."""
    choice = configs(kernel, device, dtype)
    if kernel == "schedule":
        return choice[-1 if num_rows > _MANY_ASSIGNMENTS else 0]
    if kernel in GEMM_KERNELS and kernel != "grad_weight" and num_rows < 96 * num_slots:
        choice = [config for config in choice if isinstance(config, GemmConfig) and config.block_m <= 64] or choice
    return choice[0]
