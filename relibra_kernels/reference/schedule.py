"""Sort assignments by slot with one stable sort."""

from collections.abc import Sequence

import torch

from ..planner.errors import InputError
from ..schedule import Schedule, check_slot_of_assignment, tile_bound


def build_schedule(
    slot_of_assignment_TK: torch.Tensor,
    num_slots: int,
    block_sizes: Sequence[int] = (),
    *,
    num_rows: int | None = None,
) -> Schedule:
    """The tables of `Schedule` for integer slots in `-1 .. num_slots-1` (-1 = dropped).

    Args:
        num_rows: how many assignments are not dropped, where the host knows it; None: buffers have T*K rows.

    Raises: InputError where a slot is out of range.
    """
    check_slot_of_assignment(slot_of_assignment_TK, num_slots)
    slot = slot_of_assignment_TK.reshape(-1).long()
    if slot.numel():
        low, high = (int(bound) for bound in slot.aminmax())
        if low < -1 or high >= num_slots:
            raise InputError(f"slot_of_assignment spans {low}..{high}; it must lie in -1..{num_slots - 1}")
    dropped_last = torch.where(slot < 0, num_slots, slot)
    order = dropped_last.argsort(stable=True)
    rows = torch.arange(slot.numel(), device=slot.device)

    slot_offsets = torch.zeros(num_slots + 1, dtype=torch.int32, device=slot.device)
    counts = torch.bincount(dropped_last, minlength=num_slots + 1)[:num_slots]
    slot_offsets[1:] = counts.cumsum(0)
    num_rows = slot.numel() if num_rows is None else num_rows
    if not int(slot_offsets[-1]) <= num_rows <= slot.numel():
        raise InputError(f"num_rows is {num_rows}; it must lie in {int(slot_offsets[-1])}..{slot.numel()}")
    assignment_of = torch.where(rows < slot_offsets[-1], order, -1).int()[:num_rows].contiguous()
    position_of = torch.empty_like(slot).scatter_(0, order, rows)
    position_of = torch.where(slot < 0, -1, position_of).int().view(slot_of_assignment_TK.shape)
    tiles = {block_m: tile_table(slot_offsets, num_rows, block_m) for block_m in block_sizes}
    return Schedule(slot_offsets, assignment_of, position_of, tiles)


def build_schedules(
    slot_of_assignment_RK: torch.Tensor, rows: Sequence[int], num_slots: int, num_rows: Sequence[int]
) -> list[Schedule]:
    """`build_schedule` of several parts at once, such as the layers of a micro-batch.

    Args:
        slot_of_assignment_RK: of all parts, one after another. rows: how many each part has.
        num_rows: how many assignments of each part are not dropped.
    """
    parts = slot_of_assignment_RK.split(list(rows))
    return [build_schedule(part, num_slots, num_rows=used) for part, used in zip(parts, num_rows, strict=True)]


def tile_table(slot_offsets: torch.Tensor, num_rows: int, block_m: int) -> torch.Tensor:
    """int32 `[tile_bound, 2]` of (slot, first row), -1 padded; no host synchronisation."""
    offsets = slot_offsets.long()
    num_slots = offsets.numel() - 1
    first_tile = torch.zeros_like(offsets)
    first_tile[1:] = ((offsets.diff() + block_m - 1) // block_m).cumsum(0)
    tile = torch.arange(tile_bound(num_rows, num_slots, block_m), device=offsets.device)
    slot = torch.searchsorted(first_tile, tile, right=True) - 1
    used = slot < num_slots
    slot = slot.clamp(max=num_slots - 1)
    first_row = offsets[slot] + (tile - first_tile[slot]) * block_m
    return torch.where(used[:, None], torch.stack([slot, first_row], dim=1), -1).int()
