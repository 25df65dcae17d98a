"""One row of bytes for everything that travels with a token: its row, its gate weights, the slots that it visits.

Layout of a row: H elements, K gate weights (fp32, or float64 for float64), K slots int16; padded to 16 bytes. The gate
weights begin at a multiple of their size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16


@dataclass(frozen=True)
class Layout:
    """Where the parts of a row of bytes are.

    `hidden`: elements of `dtype`. `gates`: gate weights or their gradients, of `gate_dtype`. `slots`: int16 each.
    """

    hidden: int
    dtype: torch.dtype
    gates: int
    gate_dtype: torch.dtype
    slots: int = 0

    @property
    def gates_at(self) -> int:
        size = self.gate_dtype.itemsize
        return -(-self.hidden * self.dtype.itemsize // size) * size

    @property
    def slots_at(self) -> int:
        return self.gates_at + self.gates * self.gate_dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Of a row."""
        return -(-(self.slots_at + 2 * self.slots) // ALIGNMENT) * ALIGNMENT

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of uint8 [n, num_bytes]: (rows [n, H], gates [n, K], slots [n, K])."""
        hidden = rows[:, : self.hidden * self.dtype.itemsize].view(self.dtype)
        gates = rows[:, self.gates_at : self.slots_at].view(self.gate_dtype)
        return hidden, gates, rows[:, self.slots_at : self.slots_at + 2 * self.slots].view(torch.int16)


def pack(layout: Layout, x_TH: Tensor, gates_TK: Tensor, slots_NK: Tensor, token_of_sent: Tensor, out: Tensor) -> None:
    """Write the payload of the tokens that are sent to uint8 `out` [n, num_bytes].

    Args: x_TH, gates_TK: of all tokens. slots_NK: int16, of the sent rows. token_of_sent: int [n].
    """
    hidden, gates, slots = layout.parts(out)
    hidden.copy_(x_TH.index_select(0, token_of_sent))
    gates.copy_(gates_TK.index_select(0, token_of_sent))
    slots.copy_(slots_NK)


def unpack(layout: Layout, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [n, H], gates [n, K], slots int16 [n, K]) of received bytes, contiguous copies."""
    hidden, gates, slots = (part.clone(memory_format=torch.contiguous_format) for part in layout.parts(rows))
    return hidden, gates, slots


def join(layout: Layout, dx_NH: Tensor, dgates_NK: Tensor, out: Tensor) -> None:
    """Write rows' gradients and those of their gate weights to uint8 `out` [n, num_bytes]."""
    hidden, gates, _ = layout.parts(out)
    hidden.copy_(dx_NH)
    gates.copy_(dgates_NK)
