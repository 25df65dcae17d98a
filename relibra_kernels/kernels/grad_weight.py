"""`grad[w] += sum over the rows r of w's slots of left[r]^T right[r]`: ragged in K, each weight contracts its own rows.

The kernel, and why its result does not depend on the launch grid, is in `grad_weight_kernels.py`.
"""

import torch

from ..configs.config import GemmConfig
from ..configs.half_tiles import has_half_tile
from ..operands import check_grad, check_operands
from ..planner.errors import ShapeError
from ..schedule import Schedule
from .constants import ceil_div, chosen_config, gemm_constants, next_power_of_2, offsets_32
from .grad_weight_kernels import _grad_weight_kernel
from .launch import launch, target
from .stores import two_stores

_CONSTANTS = ("PRECISION", "UPCAST", "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")


def grad_weight(
    left: torch.Tensor,
    right: torch.Tensor,
    schedule: Schedule,
    grad: torch.Tensor,
    *,
    gather_left: bool = False,
    gather_right: bool = False,
    replica_grad: torch.Tensor | None = None,
    weight_of_slot: torch.Tensor | None = None,
    accumulate: bool = True,
    config: GemmConfig | None = None,
) -> None:
    """`grad[w] += sum over the slots s of weight w, in slot order, of left[rows of s]^T @ right[rows of s]`, in place.

    Args:
        left, right: `[rows, N]` and `[rows, D]` rows in slot order, or `[T, ...]` tokens with the `gather_` flag.
        grad: `[E, N, D]`, fp32 where it accumulates. `replica_grad` `[S, N, D]` likewise.
        accumulate: False overwrites both buffers, in any dtype, and zeroes the weights that no row uses.
    """
    n, d = left.shape[1], right.shape[1]
    config = config or chosen_config("grad_weight", left, schedule, (n, d), layout=gather_left)
    check_grad(grad, (n, d), accumulate)
    check_operands(left, schedule.num_tokens if gather_left else schedule.num_rows)
    check_operands(right, schedule.num_tokens if gather_right else schedule.num_rows)
    if left.dtype != right.dtype:
        raise ShapeError(f"left is {left.dtype} and right {right.dtype}; they must be the same")
    weights = grad.shape[0] + (0 if replica_grad is None else replica_grad.shape[0])
    stores = two_stores(grad, replica_grad)
    constants = gemm_constants(left, config, widths=(n, d), described=(left, right))
    device = target(left)
    writes = device.tma and stores.other is None and grad.data_ptr() % 16 == 0 and d * grad.element_size() % 16 == 0
    tiles = ceil_div(n, config.block_m) * ceil_div(d, config.block_n)
    # two tiles a program share its descriptors, where there are enough programs all the same
    tiles_a_program = 2 if tiles > 1 and weights * tiles >= 8 * device.programs else 1
    launch(
        _grad_weight_kernel,
        (weights * ceil_div(tiles, tiles_a_program),),
        left,
        right,
        stores.base,
        stores.other,
        schedule.slot_offsets,
        weight_of_slot,
        schedule.assignment_of,
        schedule.num_rows,
        schedule.num_slots,
        grad.shape[0],
        *stores.arguments,
        N=n,
        D=d,
        TOP_K_LEFT=schedule.top_k if gather_left else 0,
        TOP_K_RIGHT=schedule.top_k if gather_right else 0,
        ACCUMULATE=accumulate,
        TMA_WRITES=writes,
        WIDTH=min(config.block_n, 64),
        TILES=tiles_a_program,
        HALF_LAST=has_half_tile("grad_weight", d, config.block_n),
        SLOTS=next_power_of_2(schedule.num_slots),
        OFFSETS_32=offsets_32(left, right),
        TMA=constants["TMA"] and schedule.num_rows > 0,  # a descriptor describes at least one row
        **{name: constants[name] for name in _CONSTANTS},
    )
