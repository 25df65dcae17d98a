"""Tokens, which rows carry them, and payload rows made one at a time: what packing is compared with."""

import torch

from relibra_kernels.payload import PayloadLayout
from relibra_kernels.schedule import Schedule


def tables(tokens, top_k, ranks, seed=0):
    """(slots int16 [N, K], the schedule of rows): one row a token and visited rank; some choices go nowhere."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.randint(-1, ranks, (tokens, top_k), generator=generator)
    slot = torch.randint(0, 300, (tokens, top_k), generator=generator).to(torch.int16)
    pairs = sorted({(int(r), t) for t in range(tokens) for r in rank[t] if r >= 0})
    slots = torch.full((len(pairs), top_k), -1, dtype=torch.int16)
    position = torch.full((tokens, top_k), -1, dtype=torch.int32)
    first = torch.zeros(len(pairs), dtype=torch.int32)
    for row, (r, t) in enumerate(pairs):
        choices = (rank[t] == r).nonzero().flatten()
        slots[row, choices] = slot[t, choices]
        position[t, choices[0]] = row
        first[row] = t * top_k + choices[0]
    return slots, Schedule(torch.tensor([0, len(pairs)], dtype=torch.int32), first, position)


def check_both_ways(ops, tokens, top_k, ranks, hidden_size, dtype):
    """Pack and unpack, both ways, with the functions of `ops`; sums against float64."""
    slots, send = tables(tokens, top_k, ranks)
    count, generator = len(slots), torch.Generator().manual_seed(1)
    x = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    weights = torch.randn(tokens, top_k, generator=generator)
    layout = PayloadLayout(hidden_size, top_k, dtype)
    payload = layout.new(count, x.device)
    ops.pack_payload(x, weights, slots, send, payload)
    token_of_row = send.assignment_of.long() // top_k
    expected = x[token_of_row], weights[token_of_row], slots
    for name, a, b in zip(("hidden", "weights", "slots"), ops.unpack_payload(payload, layout), expected, strict=True):
        assert a.is_contiguous() and a.dtype == b.dtype and a.equal(b), name
    narrow = weights.bfloat16()  # gate weights of any dtype travel in fp32
    ops.pack_payload(x, narrow, slots, send, payload)
    assert ops.unpack_payload(payload, layout)[1].equal(narrow.float()[token_of_row])

    dx, dgates = torch.randn(count, hidden_size, generator=generator).to(dtype), torch.randn(count, top_k)
    dgates[slots < 0] = 0  # a row has gradients of the choices that went with it
    back = layout._replace(has_slots=False)
    returned = back.new(count, x.device)
    ops.pack_gradients(dx, dgates, returned)
    dx_T, dweights = ops.unpack_gradients(returned, send, back)
    total = torch.zeros(tokens, hidden_size, dtype=torch.float64).index_add_(0, token_of_row, dx.double())
    assert dweights.equal(torch.zeros(tokens, top_k).index_add_(0, token_of_row, dgates))
    assert dx_T.dtype == dtype and dweights.dtype == torch.float32
    _, rounded = ops.unpack_gradients(returned, send, back, weights_dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), dweights, rtol=2**-7, atol=1e-6)
    return dx_T, total
