"""Payload rows against their definition, and what is refused."""

import pytest
import torch
from payload_cases import check_both_ways, tables
from tolerance import RELATIVE, assert_close

from relibra_kernels import ops
from relibra_kernels.payload import PayloadLayout
from relibra_kernels.planner.errors import ShapeError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "top_k", "ranks"), [(0, 2, 2), (1, 1, 1), (7, 3, 2), (40, 8, 4), (9, 6, 1)])
def test_both_ways(tokens, top_k, ranks, dtype):
    got, expected = check_both_ways(ops, tokens, top_k, ranks, 40, dtype)
    assert_close(got, expected, RELATIVE[dtype])


def test_the_layout():
    layout = PayloadLayout(2048, 8, torch.bfloat16)
    assert (layout.slots_at, layout.weights_at, layout.row_bytes) == (4096, 4112, 4144)
    odd = PayloadLayout(3, 3, torch.bfloat16)  # weights at a multiple of 4, rows of 16
    assert (odd.slots_at, odd.weights_at, odd.row_bytes) == (6, 12, 32)


def test_what_does_not_fit_is_refused():
    slot, row_of, rows = tables(4, 2, 2)
    x, weights = torch.zeros(4, 8), torch.zeros(4, 2)

    def refuse(match, x=x, weights=weights, slot=slot, row_of=row_of):
        with pytest.raises(ShapeError, match=match):
            ops.pack_payload(x, weights, slot, row_of, rows)

    refuse("x is torch.int8", x=x.to(torch.int8))
    refuse(r"x is .* contiguous with 4 rows", x=x[:3])
    refuse("weights is torch.int64", weights=weights.long())
    refuse(r"slot_TK is \(4, 1\)", slot=slot[:, :1])
    refuse(r"slot_TK is torch.int32 .* torch.int16", slot=slot.int())
    refuse(r"row_of_TK is torch.int64 .* torch.int32", row_of=row_of.long())
    layout = PayloadLayout(8, 2, torch.float32)
    with pytest.raises(ShapeError, match=r"payload is torch.uint8 \(3, 40\).*uint8 \[rows, 48\]"):
        ops.unpack_payload(torch.zeros(3, 40, dtype=torch.uint8), layout)
    with pytest.raises(ShapeError, match=r"row_of_TK is torch.int64"):
        ops.unpack_gradients(torch.zeros(3, 48, dtype=torch.uint8), row_of.long(), layout)
