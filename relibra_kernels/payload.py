"""How a token travels to another rank: one row of bytes with its hidden state, its slots there and its gate weights."""

from typing import NamedTuple

import torch

from .operands import check_computable, check_rows
from .planner.errors import ShapeError

_GRANULE = 16  # bytes: rows start where copies of 16 bytes can


class PayloadLayout(NamedTuple):
    """Where the parts of a payload row lie: H elements of `dtype`, K int16 slots, K fp32 gate weights.

    Weights start at the next multiple of 4 bytes, and rows are padded to a multiple of 16. The same layout serves both
    ways: on the way back the H elements are a gradient, the weights are gate gradients, and slots are not used.

    Example: H = 2048 in bf16 and K = 8 give slots at byte 4096, weights at 4112, rows of 4144 bytes.
    """

    hidden_size: int
    top_k: int
    dtype: torch.dtype

    @property
    def slots_at(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    @property
    def weights_at(self) -> int:
        return -(-(self.slots_at + 2 * self.top_k) // 4) * 4

    @property
    def row_bytes(self) -> int:
        return -(-(self.weights_at + 4 * self.top_k) // _GRANULE) * _GRANULE

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
        """fp32 `[rows, K]`, a view."""
        return payload.view(torch.float32)[:, self.weights_at // 4 :][:, : self.top_k]


def check_payload(payload: torch.Tensor, layout: PayloadLayout) -> None:
    """Refuse bytes that are not rows of `layout`."""
    if payload.dtype != torch.uint8 or payload.shape[1:] != (layout.row_bytes,) or not payload.is_contiguous():
        raise ShapeError(
            f"payload is {payload.dtype} {tuple(payload.shape)} with strides {payload.stride()}; it must be contiguous "
            f"uint8 [rows, {layout.row_bytes}]"
        )


def check_tokens(x_TH: torch.Tensor, weights_TK: torch.Tensor, **tables: torch.Tensor) -> None:
    """Refuse tokens, gate weights and tables `[T, K]` that do not go together."""
    check_computable("x", x_TH)
    check_rows("x", x_TH, len(weights_TK))
    if not weights_TK.is_floating_point():
        raise ShapeError(f"weights is {weights_TK.dtype}; it must be floating")
    for name, table in {"weights": weights_TK, **tables}.items():
        if table.ndim != 2 or table.shape != weights_TK.shape or not table.is_contiguous():
            raise ShapeError(
                f"{name} is {tuple(table.shape)} with strides {table.stride()}; it must be contiguous "
                f"{tuple(weights_TK.shape)}"
            )
    check_tables(**tables)


def check_tables(**tables: torch.Tensor) -> None:
    """Refuse tables of another dtype than their kernel reads: int16 slots and int32 rows."""
    for name, table in tables.items():
        wanted = torch.int16 if name.startswith("slot") else torch.int32
        if table.dtype != wanted or table.ndim != 2 or not table.is_contiguous():
            raise ShapeError(
                f"{name} is {table.dtype} {tuple(table.shape)} with strides {table.stride()}; it must be contiguous "
                f"{wanted} [T, K]"
            )
