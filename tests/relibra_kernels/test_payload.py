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
    assert (layout.weights_at, layout.slots_at, layout.row_bytes) == (4096, 4128, 4144)
    odd = PayloadLayout(3, 3, torch.bfloat16, torch.float64)  # weights at a multiple of 8, rows of 16
    assert (odd.weights_at, odd.slots_at, odd.row_bytes) == (8, 32, 48)
    assert odd._replace(has_slots=False).row_bytes == 32


def test_what_does_not_fit_is_refused():
    slots, send = tables(4, 2, 2)
    x, weights = torch.zeros(4, 8), torch.zeros(4, 2)
    layout = PayloadLayout(8, 2, torch.float32)
    out = layout.new(len(slots), x.device)

    def refuse(match, x=x, weights=weights, slots=slots, out=out):
        with pytest.raises(ShapeError, match=match):
            ops.pack_payload(x, weights, slots, send, out)

    refuse("x is torch.int8", x=x.to(torch.int8))
    refuse(r"x is .* contiguous with 4 rows", x=x[:3])
    refuse("weights is torch.int64", weights=weights.long())
    refuse(r"weights is \(4, 1\)", weights=weights[:, :1].contiguous())
    refuse(r"slots is torch.int32 .* torch.int16", slots=slots.int())
    refuse(r"payload is torch.uint8 \(1, 48\)", out=out[:1])
    with pytest.raises(ShapeError, match=r"payload is torch.uint8 \(3, 40\).*uint8 \[rows, 48\]"):
        ops.unpack_payload(torch.zeros(3, 40, dtype=torch.uint8), layout)
    with pytest.raises(ShapeError, match=r"payload is torch.uint8 \(1, 48\)"):
        ops.unpack_gradients(out[:1], send, layout)
