"""What is tuned: the launches of a layer over a grid of routed sizes, each with even and with uneven groups."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..planner import RoutingTrace
from ..planner.errors import InputError
from .limits import Device
from .lookup import octave
from .model import Work, balanced, skewed
from .models import Model
from .store import Entry

SLOTS = (2, 8, 32, 128)
ROWS_PER_SLOT = (16, 64, 256, 1024, 4096)
# kernel -> the parts of a layer that it computes, in the order of a training step
PARTS = {
    "gate_up": ("gate_up",),
    "grouped_gemm": ("down", "dx"),
    "grad_hidden": ("grad_hidden",),
    "grad_weight": ("gate_up", "down"),
}
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
        n, d = layer_shape(self.model, self.part).sizes(self.kernel)[:2]
        by_pointer = self.kernel in ("gate_up", "grad_hidden") and not device.descriptor_gather
        gathers = by_pointer or self.kernel == "grad_weight"
        return [Work(self.kernel, n, d, gathers, rows) for rows in self.groups]


def one_time(even: float, *uneven: float) -> float:
    """One figure for all group tables: half the even one's, half the mean of the uneven ones'."""
    return (even + sum(uneven) / len(uneven)) / 2 if uneven else even


def layer_shape(model: Model, part: str) -> Entry:
    """An entry without buckets: the shape under which configs for `model` are stored."""
    form = model.form
    shape = (part, "bf16", model.hidden_size, model.intermediate_size, form.is_transposed, not form.is_concatenated)
    return Entry(*shape, "compiled", "", None, "", (), (model.name,))


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
    for slots in [size for size in SLOTS if size <= model.num_experts] or [1]:
        if tokens:
            rows = sorted({1 << max(octave(count * model.top_k // slots) - 1, 0) for count in tokens})
        else:
            rows = list(ROWS_PER_SLOT)
        for rows_per_slot in rows:
            uneven = (skewed(slots, rows_per_slot),) if trace is None else recorded(trace, slots, rows_per_slot)
            groups = (balanced(slots, rows_per_slot), *uneven)
            for kernel in kernels:
                found += [Goal(model, kernel, part, slots, rows_per_slot, groups) for part in PARTS[kernel]]
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
