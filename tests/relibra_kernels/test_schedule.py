"""The tables of a schedule against their definition, one assignment at a time."""

import pytest
import torch
from routing import random_slots, routing_cases

from relibra_kernels.planner.errors import InputError, ShapeError
from relibra_kernels.reference import build_schedule
from relibra_kernels.schedule import tile_bound

CASES = routing_cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tables_follow_the_definition(case):
    schedule = build_schedule(case.slots, case.num_slots, block_sizes=(4, 16))
    flat = case.slots.flatten().tolist()
    rows = [a for slot in range(case.num_slots) for a, s in enumerate(flat) if s == slot]
    assert schedule.assignment_of.tolist() == rows + [-1] * (len(flat) - len(rows))
    offsets = [sum(s in range(slot) for s in flat) for slot in range(case.num_slots + 1)]
    assert schedule.slot_offsets.tolist() == offsets
    position = {a: row for row, a in enumerate(rows)}
    assert schedule.position_of.flatten().tolist() == [position.get(a, -1) for a in range(len(flat))]
    for block_m, tiles in schedule.tiles.items():
        expected = [
            [slot, row] for slot in range(case.num_slots) for row in range(offsets[slot], offsets[slot + 1], block_m)
        ]
        assert len(tiles) == tile_bound(len(flat), case.num_slots, block_m)
        assert tiles.tolist() == expected + [[-1, -1]] * (len(tiles) - len(expected))


def test_the_docstring_example():
    schedule = build_schedule(torch.tensor([[2, 0], [0, -1], [2, 0]]), 3, block_sizes=(2,))
    assert schedule.slot_offsets.tolist() == [0, 3, 3, 5]
    assert schedule.assignment_of.tolist() == [1, 2, 5, 0, 4, -1]
    assert schedule.position_of.tolist() == [[3, 0], [1, -1], [4, 2]]
    assert schedule.tiles[2].tolist() == [[0, 0], [0, 2], [2, 3], [-1, -1], [-1, -1], [-1, -1]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype(dtype):
    slots = random_slots(30, 4, 100)
    expected = build_schedule(slots, 100)
    got = build_schedule(slots.to(dtype), 100)
    assert got.assignment_of.equal(expected.assignment_of) and got.assignment_of.dtype == torch.int32


@pytest.mark.parametrize("bad", [-2, 4])
def test_slots_out_of_range_are_refused(bad):
    slots = torch.tensor([[0, 1], [3, bad]])
    with pytest.raises(InputError, match=r"must lie in -1\.\.3"):
        build_schedule(slots, 4)


def test_wrong_arrays_are_refused():
    with pytest.raises(ShapeError, match=r"must be integers \[T, K\]"):
        build_schedule(torch.zeros(4, 2), 4)
    with pytest.raises(ShapeError, match=r"must be integers \[T, K\]"):
        build_schedule(torch.zeros(4, dtype=torch.int64), 4)
    with pytest.raises(ShapeError, match="num_slots is 0"):
        build_schedule(torch.zeros(4, 2, dtype=torch.int64), 0)


def test_known_row_counts_shorten_the_buffers():
    slots = random_slots(30, 4, 8, dropped=0.5)
    used = int((slots >= 0).sum())
    schedule = build_schedule(slots, 8, block_sizes=(16,), num_rows=used)
    full = build_schedule(slots, 8, block_sizes=(16,))
    assert schedule.num_rows == used and full.num_rows == 120
    assert schedule.assignment_of.equal(full.assignment_of[:used])
    assert schedule.position_of.equal(full.position_of) and schedule.slot_offsets.equal(full.slot_offsets)
    assert schedule.tiles[16].equal(full.tiles[16][: tile_bound(used, 8, 16)])
    for bad in (used - 1, 121):
        with pytest.raises(InputError, match=f"num_rows is {bad}"):
            build_schedule(slots, 8, num_rows=bad)
