"""Every launch that the library can make, on tensors without memory: what `relibra compile` compiles.

The launchers themselves choose arguments and constants, so what is compiled is what would run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

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

# kernel -> the products of a layer that it computes
PARTS = {
    "gate_up": ("gate_up",),
    "grouped_gemm": ("down", "dx"),
    "grad_hidden": ("grad_hidden",),
    "grad_weight": ("gate_up", "down"),
}


class Make(Protocol):
    """Makes a tensor; by default one without memory."""

    def __call__(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor: ...


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_schedule(block_sizes: tuple[int, ...] = (16, 32, 64, 128, 256)) -> Schedule:
    rows, index = TOKENS * TOP_K, torch.int32
    tiles = {m: meta(tile_bound(rows, SLOTS, m), 2, dtype=index) for m in block_sizes}
    return Schedule(meta(SLOTS + 1, dtype=index), meta(rows, dtype=index), meta(TOKENS, TOP_K, dtype=index), tiles)


@dataclass(frozen=True)
class Layer:
    """One layer whose launches are made: its sizes, and where its tensors come from.

    Attributes:
        replicas: how many of the schedule's slots are in the replica store; 0: there is none.
        accumulate: weight gradients are added to fp32 buffers; else written in the rows' dtype.
    """

    hidden_size: int
    half: int
    form: ExpertForm
    schedule: Schedule
    replicas: int = 0
    accumulate: bool = False
    dtype: torch.dtype = torch.bfloat16
    make: Make = meta

    def call(self, kernel: str, part: str, config: GemmConfig | None) -> partial:
        """A call that computes one part of the layer with `kernel`; `config` is a keyword of it."""
        return getattr(self, f"_{kernel}")(part, config)

    def _rows(self, count: int, width: int) -> torch.Tensor:
        return self.make(count, width, dtype=self.dtype)

    def _stores(self, name: str, shape: tuple[int, ...], replica: str, dtype: torch.dtype | None = None) -> dict:
        dtype, slots = dtype or self.dtype, self.schedule.num_slots
        home, guest = slots - self.replicas, self.replicas
        return {
            name: self.make(home, *shape, dtype=dtype),
            replica: self.make(guest, *shape, dtype=dtype) if guest else None,
        }

    def _biases(self, width: int) -> dict[str, Any]:
        return self._stores("bias", (width,), "replica_bias") if self.form.has_bias else {}

    def _where(self, config: GemmConfig | None) -> dict[str, Any]:
        table = torch.arange(self.schedule.num_slots, dtype=torch.int32, device=self.schedule.slot_offsets.device)
        return {"weight_of_slot": table if self.replicas else None, "config": config}

    def _gate_up(self, part: str, config: GemmConfig | None) -> partial:
        weights = self._stores("gate_up", self.form.gate_up_shape(self.hidden_size, self.half), "replica_gate_up")
        how: dict[str, Any] = {**weights, **self._biases(2 * self.half), **self._where(config)}
        x = self._rows(self.schedule.num_tokens, self.hidden_size)
        return partial(kernels.grouped_gemm_swiglu, x, schedule=self.schedule, form=self.form, **how)

    def _grouped_gemm(self, part: str, config: GemmConfig | None) -> partial:
        down, transposed = part == "down", self.form.is_transposed
        shape = (self.form.down_shape if down else self.form.gate_up_shape)(self.hidden_size, self.half)
        how: dict[str, Any] = {**self._stores("weight", shape, "replica_weight"), **self._where(config)}
        how |= self._biases(self.hidden_size) if down else {}
        a = self._rows(self.schedule.num_rows, self.half if down else 2 * self.half)
        return partial(kernels.grouped_gemm, a, schedule=self.schedule, transpose_weight=down != transposed, **how)

    def _grad_hidden(self, part: str, config: GemmConfig | None) -> partial:
        weights = self._stores("down", self.form.down_shape(self.hidden_size, self.half), "replica_down")
        how: dict[str, Any] = {**weights, **self._biases(self.hidden_size), **self._where(config)}
        dout = self._rows(self.schedule.num_tokens, self.hidden_size)
        h = self._rows(self.schedule.num_rows, 2 * self.half)
        gates = self.make(self.schedule.num_tokens, self.schedule.top_k, dtype=torch.float32)
        return partial(kernels.grad_hidden, dout, h, gates, schedule=self.schedule, form=self.form, **how)

    def _grad_weight(self, part: str, config: GemmConfig | None) -> partial:
        of_gate_up, transposed = part == "gate_up", self.form.is_transposed
        shape = (self.form.gate_up_shape if of_gate_up else self.form.down_shape)(self.hidden_size, self.half)
        of = torch.float32 if self.accumulate else self.dtype
        how: dict[str, Any] = {**self._stores("grad", shape, "replica_grad", of), **self._where(config)}
        tokens = self._rows(self.schedule.num_tokens, self.hidden_size)
        rows = self._rows(self.schedule.num_rows, 2 * self.half if of_gate_up else self.half)
        # the weight's rows are the output columns of its product, or its contraction where it is transposed
        tokens_left = of_gate_up == transposed
        left, right = (tokens, rows) if tokens_left else (rows, tokens)
        how |= {"gather_left": tokens_left, "gather_right": not tokens_left, "accumulate": self.accumulate}
        return partial(kernels.grad_weight, left, right, self.schedule, **how)


def gemm_calls(
    kernel: str, config: GemmConfig | None, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], object]]]:
    """(variant, call) of one GEMM kernel: layouts, biases, with and without a replica store."""
    for name, (hidden_size, half, form) in (("concatenated", QWEN), ("gpt-oss", OSS)):
        for replicas in (0, REPLICAS):
            layer = Layer(hidden_size, half, form, meta_schedule(), replicas, accumulate=replicas > 0, dtype=dtype)
            for part in PARTS[kernel]:
                of = f", {part}" if len(PARTS[kernel]) > 1 else ""
                yield name + (", replicas" if replicas else "") + of, layer.call(kernel, part, config)


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
