"""Every launch that the library can make, on tensors without memory: what `relibra compile` compiles.

The launchers themselves choose arguments and constants, so what is compiled is what would run.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, get_args

import torch

from .. import kernels
from ..configs.config import GEMM_KERNELS, BlockConfig, Config, GemmConfig
from ..configs.limits import Device
from ..form import GPT_OSS, Activation, ExpertForm
from ..kernels.launch import Launch, recording
from ..payload import PayloadLayout
from ..schedule import Schedule, tile_bound

TOKENS, TOP_K, EXPERTS, REPLICAS = 4096, 8, 16, 2
SLOTS = EXPERTS + REPLICAS
QWEN, OSS = (2048, 768, ExpertForm()), (2880, 2880, GPT_OSS)  # hidden size, intermediate size, form
ACTIVATES = ("gate_up", "swiglu", "grad_hidden")
OTHERS = [name for name in get_args(Activation) if name not in (ExpertForm().activation, GPT_OSS.activation)]

# kernel -> the parts of a layer that it computes, in the order of a training step
PARTS = {
    "schedule": ("schedule",),
    "permute": ("pack", "unpermute"),
    "gate_up": ("gate_up",),
    "swiglu": ("swiglu", "swiglu_backward"),
    "grouped_gemm": ("down", "dx"),
    "grad_hidden": ("grad_hidden",),
    "grad_weight": ("gate_up", "down"),
    "grad_bias": ("gate_up", "down"),
    "replica_reduce": ("gate_up", "down"),
}


class Make(Protocol):
    """Makes a tensor; by default one without memory."""

    def __call__(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor: ...


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_schedule() -> Schedule:
    rows, index = TOKENS * TOP_K, torch.int32
    tiles = {m: meta(tile_bound(rows, SLOTS, m), 2, dtype=index) for m in (16, 32, 64, 128, 256)}
    return Schedule(meta(SLOTS + 1, dtype=index), meta(rows, dtype=index), meta(TOKENS, TOP_K, dtype=index), tiles)


@dataclass(frozen=True)
class Layer:
    """One layer whose launches are made: its sizes, and where its tensors come from.

    Attributes:
        replicas: how many of the schedule's slots are in the replica store; 0: there is none.
        accumulate: weight gradients are added to fp32 buffers; else written in the rows' dtype.
    """

    hidden_size: int
    intermediate_size: int
    form: ExpertForm
    schedule: Schedule
    replicas: int = 0
    accumulate: bool = False
    dtype: torch.dtype = torch.bfloat16
    make: Make = meta

    def call(self, kernel: str, part: str, config: Config | None) -> partial:
        """A call that computes one part of the layer with `kernel`; `config` is a keyword of it."""
        return getattr(self, f"_{kernel}")(part, config)

    @property
    def _width(self) -> int:
        return self.form.width(self.intermediate_size)

    def _rows(self, count: int, width: int) -> torch.Tensor:
        return self.make(count, width, dtype=self.dtype)

    def _stores(self, *shape: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tensors of `shape` for the experts at home, and for the replicas where there are any."""
        dtype, home = dtype or self.dtype, self.schedule.num_slots - self.replicas
        replica = self.make(self.replicas, *shape, dtype=dtype) if self.replicas else None
        return self.make(home, *shape, dtype=dtype), replica

    def _biases(self, width: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self._stores(width) if self.form.has_bias else (None, None)

    def _weight_of_slot(self) -> torch.Tensor | None:
        slots = self.schedule.num_slots
        return (
            torch.arange(slots, dtype=torch.int32, device=self.schedule.slot_offsets.device) if self.replicas else None
        )

    def _gate_up(self, part: str, config: GemmConfig | None) -> partial:
        gate_up, replica = self._stores(*self.form.gate_up_shape(self.hidden_size, self.intermediate_size))
        bias, replica_bias = self._biases(self._width)
        return partial(
            kernels.grouped_gemm_swiglu,
            self._rows(self.schedule.num_tokens, self.hidden_size),
            gate_up=gate_up,
            schedule=self.schedule,
            form=self.form,
            bias=bias,
            replica_gate_up=replica,
            replica_bias=replica_bias,
            weight_of_slot=self._weight_of_slot(),
            config=config,
        )

    def _grouped_gemm(self, part: str, config: GemmConfig | None) -> partial:
        down = part == "down"
        shape = (self.form.down_shape if down else self.form.gate_up_shape)(self.hidden_size, self.intermediate_size)
        weight, replica = self._stores(*shape)
        bias, replica_bias = self._biases(self.hidden_size) if down else (None, None)
        return partial(
            kernels.grouped_gemm,
            self._rows(self.schedule.num_rows, self.intermediate_size if down else self._width),
            weight=weight,
            schedule=self.schedule,
            transpose_weight=down != self.form.is_transposed,
            bias=bias,
            replica_weight=replica,
            replica_bias=replica_bias,
            weight_of_slot=self._weight_of_slot(),
            config=config,
        )

    def _grad_hidden(self, part: str, config: GemmConfig | None) -> partial:
        down, replica = self._stores(*self.form.down_shape(self.hidden_size, self.intermediate_size))
        bias, replica_bias = self._biases(self.hidden_size)
        return partial(
            kernels.grad_hidden,
            self._rows(self.schedule.num_tokens, self.hidden_size),
            self._rows(self.schedule.num_rows, self._width),
            self._gate_weights(),
            down=down,
            schedule=self.schedule,
            form=self.form,
            bias=bias,
            replica_down=replica,
            replica_bias=replica_bias,
            weight_of_slot=self._weight_of_slot(),
            config=config,
        )

    def _grad_weight(self, part: str, config: GemmConfig | None) -> partial:
        of_gate_up = part == "gate_up"
        shape_of = self.form.gate_up_shape if of_gate_up else self.form.down_shape
        grad, replica = self._gradients(*shape_of(self.hidden_size, self.intermediate_size))
        tokens = self._rows(self.schedule.num_tokens, self.hidden_size)
        rows = self._rows(self.schedule.num_rows, self._width if of_gate_up else self.intermediate_size)
        # the weight's rows are the output columns of its product, or its contraction where it is transposed
        tokens_left = of_gate_up == self.form.is_transposed
        left, right = (tokens, rows) if tokens_left else (rows, tokens)
        return partial(
            kernels.grad_weight,
            left,
            right,
            self.schedule,
            grad=grad,
            replica_grad=replica,
            gather_left=tokens_left,
            gather_right=not tokens_left,
            weight_of_slot=self._weight_of_slot(),
            accumulate=self.accumulate,
            config=config,
        )

    def _gradients(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._stores(*shape, dtype=torch.float32 if self.accumulate else self.dtype)

    def _grad_bias(self, part: str, config: BlockConfig | None) -> partial:
        of_gate_up = part == "gate_up"
        width = self._width if of_gate_up else self.hidden_size
        grad, replica = self._gradients(width)
        return partial(
            kernels.grad_bias,
            self._rows(self.schedule.num_rows if of_gate_up else self.schedule.num_tokens, width),
            self.schedule,
            grad=grad,
            replica_grad=replica,
            weights_TK=None if of_gate_up else self._gate_weights(),
            gather=not of_gate_up,
            weight_of_slot=self._weight_of_slot(),
            accumulate=self.accumulate,
            config=config,
        )

    def _permute(self, part: str, config: Any) -> partial:
        weights = self._gate_weights()
        if part == "unpermute":
            rows = self._rows(self.schedule.num_rows, self.hidden_size)
            return partial(kernels.unpermute, rows, weights, self.schedule, config=config)
        # a row for every assignment: each on its own rank, the most that can be
        layout = PayloadLayout(self.hidden_size, self.schedule.top_k, self.dtype)
        count, device = self.schedule.num_rows, self.schedule.slot_offsets.device
        slots = torch.zeros(count, self.schedule.top_k, dtype=torch.int16, device=device)
        payload = self._rows(count, layout.row_bytes // self.dtype.itemsize).view(torch.uint8)
        tokens = self._rows(self.schedule.num_tokens, self.hidden_size)
        return partial(kernels.pack_payload, tokens, weights, slots, self.schedule, payload, config=config)

    def _swiglu(self, part: str, config: Any) -> partial:
        h = self._rows(self.schedule.num_rows, self._width)
        if part == "swiglu":
            return partial(kernels.swiglu, h, self.form, config=config)
        return partial(kernels.swiglu_backward, self._rows(len(h), self.intermediate_size), h, self.form, config=config)

    def _replica_reduce(self, part: str, config: Any) -> partial:
        shape = (self.form.gate_up_shape if part == "gate_up" else self.form.down_shape)(
            self.hidden_size, self.intermediate_size
        )
        experts = self.schedule.num_slots - self.replicas
        owners = torch.arange(min(REPLICAS, experts), device=self.schedule.slot_offsets.device)
        shards = self.make(len(owners), *shape, dtype=torch.float32)
        grad = self.make(experts, *shape, dtype=torch.float32)
        return partial(kernels.replica_reduce, grad=grad, shards=shards, expert_of_shard=owners, config=config)

    def _schedule(self, part: str, config: Any) -> partial:
        ends = self.schedule.slot_offsets[1:]
        ids = torch.searchsorted(ends, self.schedule.position_of, right=True)  # the slots that it was built from
        return partial(kernels.build_schedule, ids, self.schedule.num_slots, config=config)

    def _gate_weights(self) -> torch.Tensor:
        return self.make(self.schedule.num_tokens, self.schedule.top_k, dtype=torch.float32)


def calls(kernel: str, config: Config | None, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """(variant, call) of one kernel: layouts, biases, with and without a replica store."""
    layers = {"concatenated": QWEN, "gpt-oss": OSS}
    layers.pop({"schedule": "gpt-oss", "grad_bias": "concatenated"}.get(kernel, ""), None)  # the same again, or none
    for name, (hidden_size, intermediate_size, form) in layers.items():
        for replicas in (0, REPLICAS) if kernel in (*GEMM_KERNELS, "grad_bias") else (REPLICAS,):
            layer = Layer(
                hidden_size, intermediate_size, form, meta_schedule(), replicas, accumulate=replicas > 0, dtype=dtype
            )
            for part in PARTS[kernel]:
                of = f", {part}" if len(PARTS[kernel]) > 1 else ""
                yield name + (", replicas" if replicas else "") + of, layer.call(kernel, part, config)
    if kernel in ACTIVATES:  # the other activations, in the first of the layouts
        for activation in OTHERS:
            hidden_size, intermediate_size, form = QWEN
            form = dataclasses.replace(form, activation=activation)
            layer = Layer(hidden_size, intermediate_size, form, meta_schedule(), dtype=dtype)
            for part in PARTS[kernel]:
                yield f"{activation}, {part}", layer.call(kernel, part, config)
    yield from _besides(kernel, config, dtype)


def _besides(kernel: str, config: Any, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What a kernel's config is for as well."""
    schedule, index, (hidden_size, intermediate_size, _) = meta_schedule(), torch.int32, QWEN
    if kernel == "schedule":
        ids = meta(4 * TOKENS, TOP_K, dtype=torch.int64)  # three launches
        yield "many tokens", partial(kernels.build_schedule, ids, 128, config=config)
        halves = [2 * TOKENS] * 2
        yield "layers", partial(kernels.build_schedules, ids, halves, 128, [2 * TOKENS * TOP_K] * 2, config=config)
    elif kernel == "permute":
        rows = meta(schedule.num_rows, hidden_size, dtype=dtype)
        yield "unpermute, plain sum", partial(kernels.unpermute, rows, None, schedule, config=config)
        yield from _payload(dtype)
    elif kernel == "replica_reduce":
        weights = meta(EXPERTS, 2 * intermediate_size, hidden_size, dtype=torch.float32)
        yield "pack", partial(kernels.pack_replicas, weights, meta(4, dtype=index), torch.bfloat16, config=config)


def _payload(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Unpacking, and both ways of gradients: two rows a token."""
    layout = PayloadLayout(QWEN[0], TOP_K, dtype)
    back = layout._replace(has_slots=False)
    x, weights = meta(TOKENS, QWEN[0], dtype=dtype), meta(TOKENS, TOP_K, dtype=torch.float32)
    count, index = 2 * TOKENS, torch.int32
    send = Schedule(meta(2, dtype=index), meta(count, dtype=index), meta(TOKENS, TOP_K, dtype=index))
    yield "unpack_payload", partial(kernels.unpack_payload, layout.new(count, torch.device("meta")), layout)
    yield "pack_gradients", partial(kernels.pack_gradients, x, weights, back.new(TOKENS, torch.device("meta")))
    returned = back.new(count, torch.device("meta"))
    yield "unpack_gradients", partial(kernels.unpack_gradients, returned, send, back)


def recorded(device: Device, call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` would make on `device`."""
    launches: list[Launch] = []
    with recording(device, launches.append):
        call()
    return launches
