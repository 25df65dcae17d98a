"""How long a grouped GEMM would take, from the tiles of its actual group sizes and a compiler's report. docs/tuning.md.

A model, not a measurement: it is there to order configs, and its microseconds are no claim.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from ..compiling.machine_code import MachineCode
from ..configs.config import GemmConfig
from ..configs.half_tiles import has_half_tile
from ..configs.products import Product
from .launch_model import ITEM, LaunchEstimate, Resources, Work, bounded

_TILE_CLOCKS = 400  # per tile: its indices, the first addresses, the last barrier
_PADDING_CLOCKS = 100  # a padding tile: one load
_ACCUMULATOR = 4  # bytes
_SCHEDULERS = 4  # of an SM, each issues an instruction a clock
_DESCRIPTOR_CLOCKS = 1200  # a descriptor made in the tile loop: a flush, then a cold fetch


@dataclass(frozen=True)
class _Tile:
    """A program's tile: m x n accumulators, and the bytes that it reads and writes after the last step."""

    m: int
    n: int
    after: int


def _tile(kernel: str, config: GemmConfig) -> _Tile:
    m, n = config.block_m, config.block_n
    if kernel == "gate_up":  # gate and up columns; writes both and the activation
        return _Tile(m, 2 * n, m * 3 * n * ITEM)
    if kernel == "grad_hidden":  # reads h, writes dh and w*a
        return _Tile(m, n, m * 5 * n * ITEM)
    if kernel == "grad_weight":  # reads and writes an fp32 sum
        return _Tile(m, n, 2 * m * n * _ACCUMULATOR)
    return _Tile(m, n, m * n * ITEM)


def shared_bytes_a_step(config: GemmConfig, tile: _Tile, unit: str) -> int:
    """Bytes that one step of block_k moves from and to shared memory: the loads into it, and what the unit reads."""
    if unit == "warpgroup":  # a warpgroup multiplies 64 rows with all of its columns
        groups = max(config.num_warps // 4, 1)
        down = min(groups, max(tile.m // 64, 1))
        across = groups // down
        read: float = max(tile.m // 64, 1) * across * (64 + tile.n // across)
    elif unit == "tensor_memory":  # 128 rows with all columns
        read = max(tile.m // 128, 1) * (min(tile.m, 128) + tile.n)
    else:  # every warp loads its own part into registers; the squarest split over warps moves least
        splits = [(down, config.num_warps // down) for down in (1, 2, 4, 8) if down <= config.num_warps]
        read = config.num_warps * min(tile.m / down + tile.n / across for down, across in splits)
    return int((read + tile.m + tile.n) * config.block_k * ITEM)


def step_clocks(config: GemmConfig, tile: _Tile, product: Product, code: MachineCode | None) -> float:
    """Clocks of one step of one program that has an SM for itself.

    The slowest of multiplying, of moving what the products read from shared memory, and of issuing the instructions:
    those of the compiled loop where `code` is known, else what the tile's shape asks for.
    """
    rate = float(product.fma)
    if product.unit == "tensor_memory":
        rate *= min(tile.m, 128) / 128
    multiply = tile.m * tile.n * config.block_k / rate
    if code is None or not code.matrix_clocks:
        return max(multiply, shared_bytes_a_step(config, tile, product.unit) / product.shared)
    moving = multiply * code.shared_bytes_a_clock / product.shared
    return max(multiply, moving, code.instructions * config.num_warps / _SCHEDULERS)


def tile_columns(kernel: str, columns: int, config: GemmConfig, product: Product) -> float:
    """Tiles that cover `columns`; of a half one the share of a whole one's time that it takes: above a half where it
    waits for shared memory.
    """
    tiles = math.ceil(columns / config.block_n)
    if not has_half_tile(kernel, columns, config.block_n):
        return tiles
    half = replace(config, block_n=config.block_n // 2)
    clocks = [step_clocks(each, _tile(kernel, each), product, None) for each in (half, config)]
    return tiles - 1 + clocks[0] / clocks[1]


def estimate_gemm(work: Work, config: GemmConfig, resources: Resources, product: Product) -> LaunchEstimate:
    """The time of `work` with `config`, which needs `resources`."""
    return (_weight_gradient if work.kernel == "grad_weight" else _row_tiles)(work, config, resources, product)


def _resident(config: GemmConfig, resources: Resources, most: int) -> int:
    """Programs that share an SM."""
    return max(1, min(resources.warps_per_sm // config.num_warps, most))


def _wave_clocks(
    config: GemmConfig,
    tile: _Tile,
    steps: float,
    resident: int,
    gathers: bool,
    product: Product,
    code: MachineCode | None,
) -> float:
    """Clocks until `resident` tiles of `steps` steps on every SM are done.

    The slowest of: multiplying all of them; loading all of them from L2; and one after the other, filling the
    pipeline, the steps of one tile (which wait for their loads: one fewer in flight than there are buffers), and what
    follows: reading and writing, and issuing the epilogue's instructions.
    """
    l2 = product.l2 / product.sms
    line = min(1.0, config.block_k * ITEM / 128) if gathers else 1.0  # gathered rows: a piece of a 128-byte line
    load = (tile.m / line + tile.n) * config.block_k * ITEM / l2
    multiply, after = step_clocks(config, tile, product, code), tile.after / l2
    buffers = min(code.buffers) if code is not None and code.buffers else config.num_stages
    step = max(multiply, load, (product.latency + load) / max(buffers - 1, 1))
    issue = extra = 0.0
    if code is not None:
        issue = code.epilogue_instructions * config.num_warps / _SCHEDULERS
        extra = code.descriptors * _DESCRIPTOR_CLOCKS
    start, ending = _TILE_CLOCKS + product.latency, max(after, issue)
    if config.is_specialised:  # a tile is stored while the next is multiplied
        return max(steps * multiply, issue, steps * load + after, start + max(steps * step, ending))
    alone = start + steps * step + ending + extra
    return max(resident * (steps * multiply + issue), resident * (steps * load + after), alone)


def _row_tiles(work: Work, config: GemmConfig, resources: Resources, product: Product) -> LaunchEstimate:
    """Kernels whose tiles are rows x columns, walked by persistent programs."""
    tile, columns = _tile(work.kernel, config), tile_columns(work.kernel, work.n, config, product)
    tiles_S = -(-work.rows // config.block_m)
    rows, row_tiles = int(work.rows.sum()), int(tiles_S.sum())
    resident = _resident(config, resources, config.programs_an_sm)
    programs, tiles = product.sms * resident, row_tiles * columns
    steps = math.ceil(work.d / config.block_k)
    whole, left = divmod(tiles, programs)
    clocks = whole * _wave_clocks(config, tile, steps, resident, work.gathers, product, resources.code)
    if left:
        clocks += _wave_clocks(
            config, tile, steps, math.ceil(left / product.sms), work.gathers, product, resources.code
        )
    padding = (math.ceil(rows / config.block_m) + len(work.rows) - row_tiles) * columns
    clocks += padding / programs * _PADDING_CLOCKS
    width = tile.n // config.block_n * work.n  # columns of the weight
    # Rows of a group stay in L2 while its columns pass, weights stay from group to group, where they take half of it.
    # Where rows do not, they are read once for all the columns that are computed at a time.
    group_rows = config.group_m * config.block_m * work.d * ITEM
    passes = 1 if group_rows <= product.l2_bytes // 2 else math.ceil(columns * config.group_m / programs)
    row_bytes = rows * work.d * ITEM * passes
    first_S = np.cumsum(tiles_S) - tiles_S
    groups_S = np.where(tiles_S > 0, (first_S + tiles_S - 1) // config.group_m - first_S // config.group_m + 1, 0)
    weight = width * work.d * ITEM
    weight_bytes = weight * int(np.minimum(groups_S, 1).sum() if weight <= product.l2_bytes // 2 else groups_S.sum())
    other = rows * work.n * tile.after // (config.block_m * config.block_n)
    padded = int((tiles_S * config.block_m).sum()) - rows
    waves = int(whole) + (left > 0)
    return bounded(clocks, row_bytes + weight_bytes + other, waves, padded, product)


def _weight_gradient(work: Work, config: GemmConfig, resources: Resources, product: Product) -> LaunchEstimate:
    """Tiles of weights: all of a slot take as long as it has rows, and start slot after slot."""
    tile = _tile(work.kernel, config)
    across, down = math.ceil(work.n / config.block_m), tile_columns(work.kernel, work.d, config, product)
    steps_S = -(-work.rows // config.block_k)
    resident = _resident(config, resources, 32)
    programs, tiles = product.sms * resident, len(work.rows) * across * down
    waves = math.ceil(tiles / programs)
    busy = min(resident, math.ceil(tiles / product.sms))
    average = _wave_clocks(config, tile, float(steps_S.mean()), busy, work.gathers, product, resources.code)
    longest = _wave_clocks(config, tile, float(steps_S.max(initial=0)), 1, work.gathers, product, resources.code)
    clocks = max(waves * average, longest)
    # Tiles of a slot run together: its rows come from DRAM once a wave where they take more than half of L2.
    row_S = work.rows * (work.n + work.d) * ITEM
    passes_S = np.where(row_S <= product.l2_bytes // 2, 1, math.ceil(across * down / programs))
    row_bytes = int((row_S * passes_S).sum())
    sums = len(work.rows) * work.n * work.d * 2 * _ACCUMULATOR
    padded = int((steps_S * config.block_k).sum() - work.rows.sum())
    return bounded(clocks, row_bytes + sums, waves, padded, product)
