"""Every launch that the library can make, on tensors without memory: what `relibra compile` compiles.

The launchers themselves choose arguments and constants, so what is compiled is what would run.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from .. import kernels
from ..form import GPT_OSS, ExpertForm
from ..kernels.launch import Launch, recording
from ..schedule import Schedule, Splits, tile_bound
from .configs import GemmConfig
from .limits import Device

TOKENS, TOP_K, EXPERTS, REPLICAS = 4096, 8, 16, 2
SLOTS = EXPERTS + REPLICAS
QWEN, OSS = (2048, 768, ExpertForm()), (2880, 2880, GPT_OSS)  # hidden size, intermediate size, form


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_schedule(block_sizes: tuple[int, ...] = (16, 32, 64, 128, 256)) -> Schedule:
    rows, index = TOKENS * TOP_K, torch.int32
    tiles = {m: meta(tile_bound(rows, SLOTS, m), 2, dtype=index) for m in block_sizes}
    return Schedule(meta(SLOTS + 1, dtype=index), meta(rows, dtype=index), meta(TOKENS, TOP_K, dtype=index), tiles)


def gemm_calls(
    kernel: str, config: GemmConfig | None, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], object]]]:
    """(variant, call) of one GEMM kernel: layouts, biases, with and without a replica store."""
    for name, (hidden_size, half, form) in (("concatenated", QWEN), ("gpt-oss", OSS)):
        for replicas in (0, REPLICAS):
            variant = name + (", replicas" if replicas else "")
            calls = _calls(kernel, hidden_size, half, form, replicas, config, dtype)
            yield from ((variant + suffix, call) for suffix, call in calls)


def _calls(
    kernel: str,
    hidden_size: int,
    half: int,
    form: ExpertForm,
    replicas: int,
    config: GemmConfig | None,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Callable[[], object]]]:
    schedule, rows, transposed = meta_schedule(), TOKENS * TOP_K, form.is_transposed
    x, h = meta(TOKENS, hidden_size, dtype=dtype), meta(rows, 2 * half, dtype=dtype)
    where: dict[str, Any] = {"weight_of_slot": meta(SLOTS, dtype=torch.int32) if replicas else None, "config": config}

    def stores(name: str, shape: tuple[int, ...], replica_name: str, of: torch.dtype = dtype) -> dict[str, Any]:
        home, replica = meta(SLOTS - replicas, *shape, dtype=of), meta(replicas, *shape, dtype=of)
        return {name: home, replica_name: replica if replicas else None}

    def biases(width: int) -> dict[str, Any]:
        return stores("bias", (width,), "replica_bias") if form.has_bias else {}

    if kernel == "gate_up":
        weights = stores("gate_up", form.gate_up_shape(hidden_size, half), "replica_gate_up")
        how: dict[str, Any] = {"schedule": schedule, "form": form, **weights, **biases(2 * half), **where}
        yield "", partial(kernels.grouped_gemm_swiglu, x, **how)
    elif kernel == "grouped_gemm":
        weights = stores("weight", form.down_shape(hidden_size, half), "replica_weight")
        how = {"schedule": schedule, **weights, **biases(hidden_size), **where}
        a = meta(rows, half, dtype=dtype)
        yield ", down", partial(kernels.grouped_gemm, a, transpose_weight=not transposed, **how)
        weights = stores("weight", form.gate_up_shape(hidden_size, half), "replica_weight")
        how = {"schedule": schedule, "transpose_weight": transposed, **weights, **where}
        yield ", dx", partial(kernels.grouped_gemm, h, **how)
    elif kernel == "grad_hidden":
        weights = stores("down", form.down_shape(hidden_size, half), "replica_down")
        how = {"schedule": schedule, "form": form, **weights, **biases(hidden_size), **where}
        yield "", partial(kernels.grad_hidden, x, h, meta(TOKENS, TOP_K, dtype=torch.float32), **how)
    elif kernel == "grad_weight":
        of = torch.float32 if replicas else dtype
        grads = stores("grad", form.gate_up_shape(hidden_size, half), "replica_grad", of)
        how = {"gather_left": transposed, "gather_right": not transposed, "accumulate": replicas > 0, **grads, **where}
        left, right = (x, h) if transposed else (h, x)
        yield "", partial(kernels.grad_weight, left, right, schedule, **how)


def other_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(kernel, variant, call) of the kernels that have no config."""
    schedule, index, (hidden_size, half, form) = meta_schedule(), torch.int32, QWEN
    rows = TOKENS * TOP_K
    ids = meta(TOKENS, TOP_K, dtype=torch.int64)
    splits = Splits(meta(128, 4, dtype=index), meta(128, 4, dtype=index))
    x, y, h = (meta(n, width, dtype=dtype) for n, width in ((TOKENS, hidden_size), (rows, 2880), (rows, 2 * half)))
    weights, grads = meta(TOKENS, TOP_K, dtype=torch.float32), meta(EXPERTS, 2 * half, hidden_size, dtype=torch.float32)
    place, wide = meta(4, dtype=index), meta(TOKENS, 2880, dtype=dtype)
    bias_grad = meta(SLOTS, 2 * half, dtype=torch.float32)
    yield "schedule", "slots", lambda: kernels.build_schedule(ids, 128, (64, 128))
    yield "schedule", "splits", lambda: kernels.build_split_schedule(ids, splits, 144, (64, 128))
    yield "permute", "forward", lambda: kernels.permute(x, schedule)
    yield "permute", "sum", lambda: kernels.unpermute(y, weights, schedule)
    yield "permute", "backward", lambda: kernels.permute_backward(y, schedule)
    yield "permute", "sum backward", lambda: kernels.unpermute_backward(wide, y, weights, schedule)
    yield "swiglu", "forward", lambda: kernels.swiglu(h, form)
    yield "swiglu", "backward", lambda: kernels.swiglu_backward(meta(rows, half, dtype=dtype), h, GPT_OSS)
    yield "replica_reduce", "sum", lambda: kernels.replica_reduce(grads, grads[:4], place)
    yield "replica_reduce", "pack", lambda: kernels.pack_replicas(grads, place, torch.bfloat16)
    yield "grad_bias", "gate_up", lambda: kernels.grad_bias(h, schedule, bias_grad)


def recorded(device: Device, call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` would make on `device`."""
    launches: list[Launch] = []
    with recording(device, launches.append):
        call()
    return launches
