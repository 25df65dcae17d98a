"""How long a launch without tensor cores would take: blocks that move, wait for and compute on rows. docs/tuning.md.

A model, not a measurement, as `gemm_model.py`.
"""

import math
from typing import NamedTuple

from ..configs.config import BlockConfig
from ..configs.products import Product
from ..kernels.schedule import COUNTED, MOST_COUNTED, counting_block
from .launch_model import ITEM, LAUNCH_US, LaunchEstimate, Resources, Work, bounded

_START_CLOCKS = 300  # of a program: being placed, its indices
_LANES = 128  # of an SM, each an operation a clock
_SUM_CLOCKS, _BARRIER_CLOCKS = 30, 60  # a sum over a warp's lanes; what its warps wait for each other
_MOST_PROGRAMS = 32  # an SM
_SCAN_ELEMENTS, _SCAN_WARPS = 4096, 8  # counts that schedule's one program adds up at a time
_COUNT_OPERATIONS = 4  # an assignment, of a histogram
_ID_BYTES, _SCHEDULE_BYTES = 8, 8 + 8 + 4 + 4  # an id; an assignment: read twice, written to two tables


class _Cost(NamedTuple):
    """Of one column of a block: bytes read and written and operations, in all and for each of a token's K rows; then
    how many loads wait for one another, and how many sums over a whole block there are for each of the K rows.
    """

    read: int
    read_k: int
    written: int
    written_k: int
    operations: int
    operations_k: int
    waits: int
    sums_k: int = 0


_COSTS = {
    "pack": _Cost(ITEM, 0, 0, ITEM, 2, 2, waits=1),
    "unpermute": _Cost(0, ITEM, ITEM, 0, 2, 4, waits=2),
    "swiglu": _Cost(2 * ITEM, 0, ITEM, 0, 24, 0, waits=1),
    "swiglu_backward": _Cost(3 * ITEM, 0, 2 * ITEM + 4, 0, 40, 0, waits=1),
    "replica_reduce": _Cost(8, 0, 4, 0, 3, 0, waits=2),
    "grad_bias": _Cost(ITEM, 0, 0, 0, 3, 0, waits=1),
}


class _Wave(NamedTuple):
    """Programs of `steps` steps each; `block` columns are computed on a step, `used` of them are real."""

    programs: int
    steps: float
    block: int
    used: float


def estimate_rows(work: Work, config: BlockConfig, resources: Resources, product: Product) -> LaunchEstimate:
    """The time of `work` with `config`, which needs `resources`."""
    if work.kernel == "schedule":
        return _schedule(work, config, resources, product)
    rows, columns = int(work.rows.sum()), math.ceil(work.n / config.columns)
    cost, top_k = _COSTS.get(work.part) or _COSTS[work.kernel], work.top_k
    if work.kernel == "permute":
        wave = _Wave(rows, columns, config.columns, work.n / columns)
    elif work.kernel == "grad_bias":
        steps_S = -(-work.rows // config.rows)
        used = rows / max(int(steps_S.sum()), 1) * work.n / columns
        wave = _Wave(len(work.rows) * columns, float(steps_S.mean()), config.rows * config.columns, used)
        longest = _Wave(1, float(steps_S.max(initial=0)), wave.block, used)
        alone = _clocks(longest, cost, top_k, config, resources, product)
        return _estimate(wave, cost, top_k, config, resources, product, at_least=alone)
    else:  # a program a block of a row, or of an expert
        wave = _Wave(rows * columns, 1, config.columns, work.n / columns)
    return _estimate(wave, cost, top_k, config, resources, product)


def _estimate(
    wave: _Wave,
    cost: _Cost,
    top_k: int,
    config: BlockConfig,
    resources: Resources,
    product: Product,
    at_least: float = 0.0,
) -> LaunchEstimate:
    clocks = max(_clocks(wave, cost, top_k, config, resources, product), at_least)
    column = cost.read + cost.written + top_k * (cost.read_k + cost.written_k)
    dram_bytes = round(wave.programs * wave.steps * wave.used * column)
    resident = _resident(config, resources)
    return bounded(clocks, dram_bytes, math.ceil(wave.programs / (product.sms * resident)), 0, product)


def _clocks(wave: _Wave, cost: _Cost, top_k: int, config: BlockConfig, resources: Resources, product: Product) -> float:
    """Clocks until all programs are done.

    A wave of them is the slowest of: moving what all programs of an SM move at its share of L2; their operations; and
    one program alone, which waits for its loads in every step.
    """
    resident = _resident(config, resources)
    operations = wave.block * (cost.operations + top_k * cost.operations_k)
    moved = wave.used * (cost.read + cost.written + top_k * (cost.read_k + cost.written_k))
    barrier = _BARRIER_CLOCKS if config.num_warps > 1 else 0
    sums = top_k * cost.sums_k * (_SUM_CLOCKS + barrier)
    mine = operations / min(_LANES, 32 * config.num_warps) + cost.waits * product.latency + sums

    def one(programs: float) -> float:
        busy = max(moved * product.sms / product.l2, operations / _LANES)
        return max(programs * wave.steps * busy, _START_CLOCKS + wave.steps * mine)

    whole, left = divmod(wave.programs, product.sms * resident)
    return whole * one(resident) + (one(math.ceil(left / product.sms)) if left else 0.0)


def _resident(config: BlockConfig, resources: Resources) -> int:
    return max(1, min(resources.warps_per_sm // config.num_warps, _MOST_PROGRAMS))


def _schedule(work: Work, config: BlockConfig, resources: Resources, product: Product) -> LaunchEstimate:
    """A program a block, in one launch where there are few assignments, else in three."""
    few = int(work.rows.sum()) <= MOST_COUNTED
    return (_schedule_at_once if few else _schedule_in_three)(work, config, resources, product)


def _schedule_at_once(work: Work, config: BlockConfig, resources: Resources, product: Product) -> LaunchEstimate:
    """Every block counts all assignments by itself, from L2, and then sorts its own."""
    assignments = int(work.rows.sum())
    columns, warps = counting_block(config)
    lanes = min(_LANES, 32 * warps)
    blocks = math.ceil(assignments / columns)
    resident = max(1, min(resources.warps_per_sm // warps, _MOST_PROGRAMS, math.ceil(blocks / product.sms)))
    waves = math.ceil(blocks / (product.sms * resident))
    busy = resident * COUNTED * max(_COUNT_OPERATIONS / _LANES, _ID_BYTES * product.sms / product.l2)
    step = max(product.latency + _COUNT_OPERATIONS * COUNTED / lanes, busy)
    count = _START_CLOCKS + math.ceil(assignments / COUNTED) * step
    moved = assignments * _SCHEDULE_BYTES + 3 * blocks * (1 << len(work.rows).bit_length()) * 4
    scatter = _scatter_clocks(columns, warps, resident, product)
    return bounded(waves * (count + scatter), moved, waves, 0, product)


def _scatter_clocks(columns: int, warps: int, resident: int, product: Product) -> float:
    """Sorting a block's assignments and writing where they go."""
    stages = math.log2(columns) * (math.log2(columns) + 1) / 2  # of a bitonic sort
    across = _BARRIER_CLOCKS * stages if warps > 1 else 0.0
    sort = stages * 8 * columns / min(_LANES, 32 * warps) + across
    return _START_CLOCKS + 3 * product.latency + max(sort, resident * stages * 8 * columns / _LANES)


def _schedule_in_three(work: Work, config: BlockConfig, resources: Resources, product: Product) -> LaunchEstimate:
    """Count and scatter, a program a block; between them one program scans over the blocks' counts."""
    assignments, slots = int(work.rows.sum()), len(work.rows)
    blocks, bins = math.ceil(assignments / config.columns), 1 << slots.bit_length()
    lanes = min(_LANES, 32 * config.num_warps)
    resident = min(_resident(config, resources), math.ceil(blocks / product.sms))
    waves = math.ceil(blocks / (product.sms * resident))
    count = _START_CLOCKS + product.latency + _COUNT_OPERATIONS * config.columns / lanes
    scatter = _scatter_clocks(config.columns, config.num_warps, resident, product)
    steps = math.ceil(blocks * bins / _SCAN_ELEMENTS)
    scan = _START_CLOCKS + steps * (2 * product.latency + 20 * _SCAN_ELEMENTS / (32 * _SCAN_WARPS))
    moved = assignments * _SCHEDULE_BYTES + 3 * blocks * bins * 4
    found = bounded(waves * (count + scatter) + scan, moved, waves, 0, product)
    return found._replace(us=found.us + 2 * LAUNCH_US)
