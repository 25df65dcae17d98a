"""Every kernel launch goes through here, so that tests can count them and `compiling` can record them."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ..configs.interpreter import interpreter_fault
from ..configs.limits import INTERPRETER, Device, device_of
from ..planner.errors import InputError

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# Small tables, which may be cut out of a larger one and begin anywhere. Triton compiles a kernel once for pointers at
# multiples of 16 bytes and once for others, unless it is told that this does not matter: else some row counts would
# compile in the middle of training. For `@triton.jit(do_not_specialize_on_alignment=TABLES)`.
TABLES = [
    "assignment_of_ptr", "cumulative_ptr", "expert_of_shard_ptr", "experts_ptr", "ids_ptr", "position_ptr",
    "slot_offsets_ptr", "slot_ptr", "tiles_ptr", "weight_of_slot_ptr", "weights_ptr",
]  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for: the kernel, its positional arguments, constants and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


_recorder: ContextVar[tuple[Device, Callable[[Launch], None]] | None] = ContextVar("relibra_recorder", default=None)


@contextmanager
def recording(device: Device, record: Callable[[Launch], None]) -> Iterator[None]:
    """Within the block nothing runs: launches are chosen as for `device` and handed to `record`."""
    token = _recorder.set((device, record))
    try:
        yield
    finally:
        _recorder.reset(token)


def target(tensor: torch.Tensor) -> Device:
    """What the kernels are launched on: the tensor's GPU, the interpreter, or the device that is being recorded for."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder[0]
    if tensor.is_meta:  # shapes alone, and nothing is launched
        return INTERPRETER
    if tensor.device.type == "cpu":
        if not INTERPRETING:
            raise InputError("the tensors are on the CPU: the kernels need a GPU, or TRITON_INTERPRET=1 from the start")
        if interpreter_fault():
            raise InputError(f"TRITON_INTERPRET is 1, but {interpreter_fault()}")
        return INTERPRETER
    return device_of(tensor.device)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`; a grid of no programs is no launch.

    Multiply-adds are fused, whatever this Triton's default is: it changes with 3.10, and results with it.
    """
    if 0 in grid:
        return
    options["enable_fp_fusion"] = True
    recorder = _recorder.get()
    if recorder is not None:
        recorder[1](Launch(kernel, grid, args, options))
        return
    first = next(argument for argument in args if isinstance(argument, torch.Tensor))
    if first.is_meta:
        return
    if options.get("TMA") and not INTERPRETING:
        triton.set_allocator(_scratch)
    with _on_device_of(first):
        kernel[grid](*args, **options)


def _on_device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def precision(dtype: torch.dtype) -> str:
    """fp32 products are exact unless the user allows tf32 as for torch's own matmuls.

    torch has an older and a newer name for that setting. Reading the older one raises once the newer one was set.
    """
    matmul = torch.backends.cuda.matmul
    if dtype != torch.float32:
        return "ieee"
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and newer
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for descriptors that kernels make on the device."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
