"""Which row of a ragged batch belongs to which expert slot: the tables that every grouped operation reads."""

from dataclasses import dataclass, field

import torch

from .planner.errors import ShapeError


@dataclass(frozen=True)
class Schedule:
    """Assignments (token t, choice k) sorted by slot; rows of one slot are in assignment order.

    Example: T = 3 tokens, K = 2, slots = 3, `slot_of_assignment = [[2, 0], [0, -1], [2, 0]]` (-1 = dropped)::

        flat assignment t*K+k     0  1  2  3  4  5
        its slot                  2  0  0 -1  2  0
        slot_offsets  = [0, 3, 3, 5]          slot 0 has rows 0..2, slot 1 none, slot 2 rows 3..4
        assignment_of = [1, 2, 5, 0, 4, -1]   row -> assignment; the tail has no assignment
        position_of   = [[3, 0], [1, -1], [4, 2]]
        tiles[2]      = [[0, 0], [0, 2], [2, 3], [-1, -1], [-1, -1], [-1, -1]]   (slot, first row), BLOCK_M = 2

    A row's source row (its token) is `assignment_of // K`.

    Attributes:
        slot_offsets: int32 [slots+1].
        assignment_of: int32 [rows], sorted row -> flat assignment, -1 in the unused tail. `rows` is T*K, or less where
            the host knows how many assignments are not dropped: it is the number of rows of every ragged buffer.
        position_of: int32 [T, K], assignment -> sorted row, -1 where dropped.
        tiles: BLOCK_M -> int32 [cdiv(rows, BLOCK_M) + slots, 2] of (slot, first row), -1 padded at the end.
    """

    slot_offsets: torch.Tensor
    assignment_of: torch.Tensor
    position_of: torch.Tensor
    tiles: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tables = {
            "slot_offsets": self.slot_offsets,
            "assignment_of": self.assignment_of,
            "position_of": self.position_of,
        }
        for name, table in tables.items():
            if table.dtype != torch.int32 or not table.is_contiguous():
                raise ShapeError(f"{name} is {table.dtype} with strides {table.stride()}; it must be contiguous int32")
        if self.position_of.ndim != 2 or self.assignment_of.ndim != 1 or self.num_rows > self.position_of.numel():
            raise ShapeError(
                f"assignment_of is {tuple(self.assignment_of.shape)} and position_of {tuple(self.position_of.shape)}; "
                "they must be [rows], with at most T*K rows, and [T, K]"
            )
        if self.slot_offsets.ndim != 1 or self.slot_offsets.numel() < 2:
            raise ShapeError(f"slot_offsets is {tuple(self.slot_offsets.shape)}; it must be [slots+1] with a slot")

    @property
    def num_slots(self) -> int:
        return self.slot_offsets.numel() - 1

    @property
    def num_tokens(self) -> int:
        return self.position_of.shape[0]

    @property
    def top_k(self) -> int:
        return self.position_of.shape[1]

    @property
    def num_rows(self) -> int:
        """Rows that a ragged buffer has; where assignments are dropped, the last of T*K rows are unused."""
        return self.assignment_of.numel()


def tile_bound(num_rows: int, num_slots: int, block_m: int) -> int:
    """Most tiles that `num_rows` rows in `num_slots` slots can need: a host-known grid size."""
    return -(-num_rows // block_m) + num_slots


def check_slot_of_assignment(slot_of_assignment: torch.Tensor, num_slots: int) -> None:
    """Refuse what no schedule can be built from; looks at shape and dtype only."""
    integer = not (slot_of_assignment.is_floating_point() or slot_of_assignment.is_complex())
    if slot_of_assignment.ndim != 2 or not integer or slot_of_assignment.dtype == torch.bool:
        raise ShapeError(
            f"slot_of_assignment is {slot_of_assignment.dtype} {tuple(slot_of_assignment.shape)}; "
            "it must be integers [T, K]"
        )
    if num_slots < 1:
        raise ShapeError(f"num_slots is {num_slots}; it must be at least 1")
    if slot_of_assignment.numel() >= 2**31:
        raise ShapeError(f"T*K is {slot_of_assignment.numel()}; it must be below 2^31")
