"""The schedule kernels give the reference's tables, in one launch or in three."""

import pytest
import torch
from routing import RoutingCase, random_slots, routing_cases

from relibra_kernels import kernels, reference
from relibra_kernels.configs.config import BlockConfig
from relibra_kernels.kernels import schedule as module
from relibra_kernels.planner.errors import InputError, ShapeError

CASES = [*routing_cases(), RoutingCase("most slots", random_slots(40, 4, 512, dropped=0.1), 512, 512)]


@pytest.fixture(params=["one launch", "three launches"], autouse=True)
def launches(request, monkeypatch):
    """Everything here is built both ways."""
    if request.param == "three launches":
        monkeypatch.setattr(module, "MOST_COUNTED", -1)
    return 1 if request.param == "one launch" else 3


def same(got, expected):
    for name in ("slot_offsets", "assignment_of", "position_of"):
        assert getattr(got, name).equal(getattr(expected, name)), name
    for block_m, tiles in expected.tiles.items():
        assert got.tiles[block_m].equal(tiles), block_m


@pytest.mark.parametrize("case", CASES, ids=str)
def test_slots(case):
    same(
        kernels.build_schedule(case.slots, case.num_slots, (16, 64)),
        reference.build_schedule(case.slots, case.num_slots, (16, 64)),
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_ids_of_every_integer_type(dtype):
    """A block that ends past the last id, and more slots than a byte can number."""
    slots = random_slots(5, 3, 100).to(dtype)
    same(kernels.build_schedule(slots, 300, (16,)), reference.build_schedule(slots, 300, (16,)))


@pytest.mark.parametrize("config", [BlockConfig(32, 1), BlockConfig(256, 4)], ids=str)
def test_any_block_gives_the_same_tables(config):
    slots = random_slots(70, 3, 20, dropped=0.1)
    same(kernels.build_schedule(slots, 20, (16,), config=config), reference.build_schedule(slots, 20, (16,)))


def test_known_row_counts_shorten_the_buffers():
    slots = random_slots(40, 3, 6, dropped=0.5).to(torch.int16)
    used = int((slots >= 0).sum())
    same(
        kernels.build_schedule(slots, 6, (16,), num_rows=used), reference.build_schedule(slots, 6, (16,), num_rows=used)
    )


@pytest.mark.parametrize("config", [None, BlockConfig(32, 1)], ids=str)
def test_several_parts_at_once(monkeypatch, config):
    """Of other lengths, some empty, each with another number of assignments that are not dropped: in three launches."""
    launched = []
    launch = module.launch
    monkeypatch.setattr(
        module, "launch", lambda kernel, *args, **how: launched.append(kernel) or launch(kernel, *args, **how)
    )
    rows = [37, 0, 5, 64, 0, 1]
    slots = torch.cat([random_slots(count, 3, 6, seed=count, dropped=0.4) for count in rows]).to(torch.int16)
    used = [int((part >= 0).sum()) for part in slots.split(rows)]
    found = kernels.build_schedules(slots, rows, 6, used, config=config)
    assert len(launched) == 3
    for part, count, got in zip(slots.split(rows), used, found, strict=True):
        assert got.tiles
        expected = reference.build_schedule(part, 6, tuple(got.tiles), num_rows=count)
        same(got, expected)
        for block_m, tiles in got.tiles.items():
            assert tiles.shape == expected.tiles[block_m].shape and tiles.data_ptr() % 16 == 0
        assert got.assignment_of.data_ptr() % 16 == 0
    for got, expected in zip(reference.build_schedules(slots, rows, 6, used), found, strict=True):
        same(expected, got)
    assert kernels.build_schedules(slots[:0], [], 6, []) == []


def test_parts_that_cannot_be():
    slots = random_slots(4, 2, 8)
    with pytest.raises(InputError, match=r"num_rows is \[2, 7\]; they must lie in 0..\[2, 6\]"):
        kernels.build_schedules(slots, [1, 3], 8, [2, 7])
    with pytest.raises(InputError, match="513 slots"):
        kernels.build_schedules(slots, [1, 3], 513, [2, 6])


def test_the_number_of_launches(monkeypatch, launches):
    launched = []
    monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **options: launched.append(kernel))
    module.build_schedule(random_slots(40, 3, 6), 6, (16, 32))
    assert len(launched) == launches


def test_blocks_that_count_more_than_once(monkeypatch, launches):
    """Assignments are counted in several parts, and a block begins in the middle of one."""
    monkeypatch.setattr(module, "COUNTED", 128)
    slots = random_slots(301, 3, 20, dropped=0.1)
    same(kernels.build_schedule(slots, 20, (16,)), reference.build_schedule(slots, 20, (16,)))


def test_too_many_slots_are_refused():
    with pytest.raises(InputError, match="513 slots"):
        kernels.build_schedule(random_slots(4, 2, 8), 513)


def test_ids_out_of_range_are_dropped_or_caught(monkeypatch):
    slots = torch.tensor([[0, 7], [1, -5]])
    assert kernels.build_schedule(slots, 2).assignment_of.tolist() == [0, 2, -1, -1]
    monkeypatch.setenv("RELIBRA_DEBUG", "1")
    with pytest.raises(RuntimeError, match=r"must lie in -1\.\.1"):
        kernels.build_schedule(slots, 2)


def test_truth_values_are_no_ids():
    with pytest.raises(ShapeError, match="must be integers"):
        kernels.build_schedule(torch.tensor([[True, False]]), 4)


@pytest.mark.parametrize("tokens", [1, 64, 65, 72, 97, 129])
def test_every_table_of_tiles_begins_at_16_bytes(tokens):
    """Triton compiles a kernel anew for a pointer that does not."""
    slots = random_slots(tokens, 2, 6)
    schedule = kernels.build_schedule(slots, 6, (64, 32, 128))
    for block, table in schedule.tiles.items():
        assert table.data_ptr() % 16 == 0, block
        assert table.equal(reference.build_schedule(slots, 6, (block,)).tiles[block])
