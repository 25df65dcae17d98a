"""Tokens, where their assignments go, and payload rows made one assignment at a time: what packing is compared with."""

import torch

from relibra_kernels.payload import PayloadLayout


def tables(tokens, top_k, ranks, seed=0):
    """(slot int16 [T, K], row int32 [T, K], rows): one row a token and visited rank; some assignments go nowhere."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.randint(-1, ranks, (tokens, top_k), generator=generator)
    slot = torch.randint(0, 300, (tokens, top_k), generator=generator).to(torch.int16)
    pairs = sorted({(int(r), t) for t in range(tokens) for r in rank[t] if r >= 0})
    number = {pair: row for row, pair in enumerate(pairs)}
    row = [[number.get((int(rank[t, k]), t), -1) for k in range(top_k)] for t in range(tokens)]
    return slot, torch.tensor(row, dtype=torch.int32).view(tokens, top_k), len(pairs)


def expected_rows(x, weights, slot, row_of, num_rows):
    """(hidden, slots, weights) of every payload row, by definition."""
    top_k = slot.shape[1]
    hidden = torch.zeros(num_rows, x.shape[1], dtype=x.dtype)
    slots, gates = torch.full((num_rows, top_k), -1, dtype=torch.int16), torch.zeros(num_rows, top_k)
    for t in range(len(x)):
        for k in range(top_k):
            row = int(row_of[t, k])
            if row >= 0:
                hidden[row], slots[row, k], gates[row, k] = x[t], slot[t, k], weights[t, k]
    return hidden, slots, gates


def check_both_ways(ops, tokens, top_k, ranks, hidden_size, dtype):
    """Pack and unpack, both ways, with the functions of `ops`; sums against float64."""
    slot, row_of, num_rows = tables(tokens, top_k, ranks)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    weights = torch.randn(tokens, top_k, generator=generator)
    layout = PayloadLayout(hidden_size, top_k, dtype)
    payload = ops.pack_payload(x, weights, slot, row_of, num_rows)
    assert payload.shape == (num_rows, layout.row_bytes) and payload.is_contiguous()
    expected = expected_rows(x, weights, slot, row_of, num_rows)
    got = ops.unpack_payload(payload, layout)
    for name, a, b in zip(("hidden", "slots", "weights"), got, expected, strict=True):
        assert a.is_contiguous() and a.dtype == b.dtype and a.equal(b), name

    dx, dgates = torch.randn(num_rows, hidden_size, generator=generator).to(dtype), torch.randn(num_rows, top_k)
    back = ops.pack_gradients(dx, dgates)
    dx_T, dweights = ops.unpack_gradients(back, row_of, layout)
    total = torch.zeros(tokens, hidden_size, dtype=torch.float64)
    for t in range(tokens):
        for row in dict.fromkeys(r for r in row_of[t].tolist() if r >= 0):
            total[t] += dx[row].double()
        for k in range(top_k):
            row = int(row_of[t, k])
            assert dweights[t, k] == (dgates[row, k] if row >= 0 else 0)
    assert dx_T.dtype == dtype and dweights.dtype == torch.float32
    return dx_T, total
