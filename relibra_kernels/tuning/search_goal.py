"""What is tuned: the launches of a layer over a grid of routed sizes, each with even and with uneven groups."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..configs.config import GEMM_KERNELS, GENERATIONS
from ..configs.files import Entry
from ..configs.limits import Device
from ..configs.lookup import octave
from ..planner import RoutingTrace
from ..planner.errors import InputError
from .catalogue import PARTS
from .launch_model import Work, balanced, skewed
from .models import Model

SLOTS = (2, 8, 32, 128)
ROWS_PER_SLOT = (16, 64, 256, 1024, 4096)
ROWS = (256, 1024, 4096, 16384, 65536)  # of kernels to which slots are nothing
_LAYERS_OF_TRACE = 3


@dataclass(frozen=True)
class Goal:
    """One part of one layer in one bucket, with the group sizes to rank by: even ones first, then uneven ones."""

    model: Model
    kernel: str
    part: str
    slots: int
    rows_per_slot: int
    groups: tuple[np.ndarray, ...]

    def works(self, device: Device) -> list[Work]:
        """One launch a group table."""
        n, d = layer_shape(self.model, self.kernel, self.part).sizes(self.kernel)[:2]
        by_pointer = self.kernel in ("gate_up", "grad_hidden") and not device.descriptor_gather
        gathers = by_pointer or self.kernel == "grad_weight"
        more = self.part, self.model.top_k
        return [Work(self.kernel, n, d, gathers, rows, *more) for rows in self.groups]


def one_time(even: float, *uneven: float) -> float:
    """One time for all group tables: the mean of that of even groups and of the mean over uneven ones."""
    return (even + sum(uneven) / len(uneven)) / 2 if uneven else even


def layer_shape(model: Model, kernel: str, part: str) -> Entry:
    """An entry without buckets: the shape under which configs for `model` are stored, 0 for what the kernel does not
    depend on.
    """
    form = model.form
    hidden_size = (
        0 if kernel in ("swiglu", "schedule") or (kernel, part) == ("grad_bias", "gate_up") else model.hidden_size
    )
    intermediate_size = (
        0 if kernel in ("permute", "schedule") or (kernel, part) == ("grad_bias", "down") else model.intermediate_size
    )
    transposed = form.is_transposed and kernel in GEMM_KERNELS
    interleaved = not form.is_concatenated and kernel in (*GEMM_KERNELS, "swiglu")
    shape = (part, "bf16", hidden_size, intermediate_size, transposed, interleaved)
    return Entry(*shape, "compiled", "", None, "", (), (model.name,), GENERATIONS.get(kernel, 1))


def goals(
    model: Model, tokens: Sequence[int] = (), trace: RoutingTrace | None = None, kernels: Sequence[str] = tuple(PARTS)
) -> list[Goal]:
    """Every part of `model` in every bucket.

    Args:
        tokens: per rank and micro-batch. A rank computes tokens * K rows on average, whatever its number of slots;
            none: a grid of rows a slot, from 16 to 4096.
        trace: recorded routing to take uneven groups from; None: log-normal ones.
    """
    if trace is not None and trace.num_experts != model.num_experts:
        raise InputError(f"trace is of {trace.num_experts} experts; {model} has {model.num_experts}")
    found = []
    for kernel in kernels:
        if kernel == "grad_bias" and not model.form.has_bias:
            continue
        for slots, rows_per_slot in _buckets(model, kernel, tokens):
            uneven = (skewed(slots, rows_per_slot),) if trace is None else recorded(trace, slots, rows_per_slot)
            groups = (balanced(slots, rows_per_slot), *(uneven if slots > 1 else ()))
            found += [Goal(model, kernel, part, slots, rows_per_slot, groups) for part in PARTS[kernel]]
    return found


def _buckets(model: Model, kernel: str, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """(slots, rows a slot) of what a kernel is tuned for."""
    if kernel == "replica_reduce":
        return [(1, 1)]  # a matter of an expert's size alone
    by_token = kernel == "permute"
    if kernel in ("permute", "swiglu"):
        choice: Sequence[int] = [1]
    else:
        choice = [size for size in SLOTS if size <= model.num_experts] or [1]
    found = []
    for slots in choice:
        rows = sorted({1 << max(octave(count * (1 if by_token else model.top_k) // slots) - 1, 0) for count in tokens})
        grid = ROWS if kernel in ("permute", "swiglu") else ROWS_PER_SLOT
        found += [(slots, count) for count in rows or grid]
    return found


def recorded(trace: RoutingTrace, slots: int, rows_per_slot: int) -> tuple[np.ndarray, ...]:
    """Group sizes of the first, a middle and the last layer: the first `slots` experts' shares, scaled to that mean."""
    _, layers, _ = trace.expert_ids.shape
    chosen = sorted({round(i * (layers - 1) / max(_LAYERS_OF_TRACE - 1, 1)) for i in range(_LAYERS_OF_TRACE)})
    tables = []
    for layer in chosen:
        ids = trace.expert_ids[:, layer]
        counts = np.bincount(ids[ids >= 0].ravel(), minlength=trace.num_experts)
        counts = np.resize(counts, slots)  # repeats the experts where there are more slots
        if not counts.sum():
            counts = np.ones(slots, np.int64)
        ends = np.cumsum(counts) * (slots * rows_per_slot) // counts.sum()
        tables.append(np.diff(ends, prepend=0))
    return tuple(tables)
