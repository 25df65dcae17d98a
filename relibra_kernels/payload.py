"""How a token travels to another rank: one row of bytes with its hidden state, its slots there and its gate weights."""

from typing import NamedTuple

import torch

from .operands import check_computable, check_rows
from .planner.errors import ShapeError
from .schedule import Schedule

_GRANULE = 16  # bytes: rows start where copies of 16 bytes can


class PayloadLayout(NamedTuple):
    """Where the parts of a payload row lie: H elements of `dtype`, K gate weights of `weights_dtype`, K int16 slots.

    Weights start at a multiple of their size, and rows are padded to a multiple of 16 bytes. On the way back the H
    elements are a gradient, the weights are gate gradients, and there are no slots (`has_slots` False).

    Example: H = 2048 in bf16 and K = 8 give weights at byte 4096, slots at 4128, rows of 4144 bytes.
    """

    hidden_size: int
    top_k: int
    dtype: torch.dtype
    weights_dtype: torch.dtype = torch.float32
    has_slots: bool = True

    @property
    def weights_at(self) -> int:
        size = self.weights_dtype.itemsize
        return -(-self.hidden_size * self.dtype.itemsize // size) * size

    @property
    def slots_at(self) -> int:
        return self.weights_at + self.top_k * self.weights_dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return -(-(self.slots_at + 2 * self.top_k * self.has_slots) // _GRANULE) * _GRANULE

    def new(self, num_rows: int, device: torch.device) -> torch.Tensor:
        """Uninitialised uint8 `[num_rows, row_bytes]`."""
        return torch.empty(num_rows, self.row_bytes, dtype=torch.uint8, device=device)

    def hidden(self, payload: torch.Tensor) -> torch.Tensor:
        """`[rows, H]`, a view."""
        return payload.view(self.dtype)[:, : self.hidden_size]

    def slots(self, payload: torch.Tensor) -> torch.Tensor:
        """int16 `[rows, K]`, a view."""
        return payload.view(torch.int16)[:, self.slots_at // 2 :][:, : self.top_k]

    def weights(self, payload: torch.Tensor) -> torch.Tensor:
        """`[rows, K]`, a view."""
        first = self.weights_at // self.weights_dtype.itemsize
        return payload.view(self.weights_dtype)[:, first:][:, : self.top_k]


def layout_of(x_TH: torch.Tensor, weights_TK: torch.Tensor) -> PayloadLayout:
    """The layout of the rows in which these tokens travel. Their gate weights may be of any floating dtype."""
    weights_dtype = torch.promote_types(weights_TK.dtype, torch.float32)
    return PayloadLayout(x_TH.shape[1], weights_TK.shape[1], x_TH.dtype, weights_dtype)


def check_payload(payload: torch.Tensor, layout: PayloadLayout, count: int | None = None) -> None:
    """Refuse bytes that are not rows of `layout`, `count` of them where it is given."""
    is_rows = payload.dtype == torch.uint8 and payload.shape[1:] == (layout.row_bytes,) and payload.is_contiguous()
    if not is_rows or count not in (None, payload.shape[0]):
        raise ShapeError(
            f"payload is {payload.dtype} {tuple(payload.shape)} with strides {payload.stride()}; it must be contiguous "
            f"uint8 [{'rows' if count is None else count}, {layout.row_bytes}]"
        )


def check_tokens(x_TH: torch.Tensor, weights_TK: torch.Tensor) -> None:
    """Refuse rows and gate weights that do not go together."""
    check_computable("x", x_TH)
    check_rows("x", x_TH, weights_TK.shape[0])
    if not weights_TK.is_floating_point() or weights_TK.ndim != 2 or not weights_TK.is_contiguous():
        raise ShapeError(
            f"weights is {weights_TK.dtype} {tuple(weights_TK.shape)} with strides {weights_TK.stride()}; "
            "it must be contiguous, floating and [T, K]"
        )


def check_sent(weights_TK: torch.Tensor, slots_NK: torch.Tensor, send: Schedule) -> None:
    """Refuse tables of another micro-batch, and slots of another dtype than kernels read."""
    if weights_TK.shape != send.position_of.shape:
        raise ShapeError(f"weights is {tuple(weights_TK.shape)}; it must be {tuple(send.position_of.shape)}")
    shape = (send.num_rows, send.top_k)
    if slots_NK.dtype != torch.int16 or slots_NK.shape != shape or not slots_NK.is_contiguous():
        raise ShapeError(
            f"slots is {slots_NK.dtype} {tuple(slots_NK.shape)} with strides {slots_NK.stride()}; it must be "
            f"contiguous torch.int16 {shape}"
        )
