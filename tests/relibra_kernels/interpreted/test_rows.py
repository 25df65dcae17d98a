"""Weighted sum, activation, replica reduction: the kernels against the reference in float64."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
import triton.language as tl
from oracle import gated
from routing import routing_cases
from tolerance import RELATIVE, assert_close
from triton.runtime import interpreter

from relibra_kernels import kernels, reference
from relibra_kernels.configs.config import BlockConfig
from relibra_kernels.form import Activation, ExpertForm
from relibra_kernels.kernels.unpermute import _unpermute_kernel
from relibra_kernels.planner.errors import InputError, ShapeError

CASES = routing_cases()
H = 40  # no power of two
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_unpermute(case, dtype):
    schedule = kernels.build_schedule(case.slots, case.num_slots)
    used, (tokens, top_k) = int(schedule.slot_offsets[-1]), case.slots.shape
    weights = normal(tokens, top_k, dtype=torch.float32, seed=2)
    y = normal(tokens * top_k, H, dtype=dtype, seed=3)
    y[used:] = float("nan")
    for gates in (weights, None):
        expected = reference.unpermute(y.double(), None if gates is None else gates.double(), schedule)
        assert_close(kernels.unpermute(y, gates, schedule), expected, RELATIVE[dtype])


@pytest.mark.parametrize("concatenated", [True, False])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_swiglu(activation, concatenated):
    if activation == "relu2" and not concatenated:
        with pytest.raises(InputError, match="is_concatenated is False; it must be True with 'relu2'"):
            ExpertForm(activation=activation, is_concatenated=False)
        return
    form = ExpertForm(activation=activation, is_concatenated=concatenated, limit=0.7)
    h, da = normal(5, form.width(36), dtype=torch.float32), normal(5, 36, dtype=torch.float32, seed=1)
    assert_close(kernels.swiglu(h, form), reference.swiglu(h.double(), form), 1e-6)
    for got, expected in zip(
        kernels.swiglu_backward(da, h, form), reference.swiglu_backward(da.double(), h.double(), form), strict=True
    ):
        assert_close(got, expected, 1e-6)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_what_is_not_a_number_stays_so(activation):
    """In gate and in up, as through torch's own clamp; its gradient may be NaN beside it where torch's is 0."""
    form = ExpertForm(activation=activation, limit=0.7)
    h, da = normal(12, form.width(5), dtype=torch.float64), normal(12, 5, dtype=torch.float64, seed=1)
    h[:4, 1] = h[2:6, -2] = math.nan
    h.requires_grad_()
    expected = torch.stack([gated(row, form) for row in h])
    expected.backward(da)
    for backend, dtype, tolerance in ((reference, torch.float64, 1e-12), (kernels, torch.float32, 1e-5)):
        x = h.detach().to(dtype)
        dh, a = backend.swiglu_backward(da.to(dtype), x, form)
        like = {"rtol": tolerance, "atol": tolerance, "equal_nan": True, "check_dtype": False}
        for got in (backend.swiglu(x, form), a):
            torch.testing.assert_close(got, expected.detach(), **like)
        torch.testing.assert_close(dh, h.grad.where(~dh.isnan(), math.nan), **like)
        assert dh[h.grad.isnan()].isnan().all() and not dh[6:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replica_reduce_is_the_reference_to_the_bit(dtype):
    grad = normal(4, 70, 60, dtype=torch.float32)  # more than a block, no multiple of it
    shards, place = normal(5, 70, 60, dtype=dtype, seed=1), torch.tensor([2, 0, 2, -1, 2], dtype=torch.int32)
    expected = grad.clone()
    reference.replica_reduce(expected, shards, place)
    kernels.replica_reduce(grad, shards, place)
    assert grad.equal(expected)
    kernels.replica_reduce(grad, shards[:0], place[:0])
    assert grad.equal(expected)


def test_pack():
    weight, places = normal(4, 70, 60, dtype=torch.float32), torch.tensor([3, 0, 3])
    assert kernels.pack_replicas(weight, places).equal(weight[places])
    assert_close(kernels.pack_replicas(weight, places, torch.bfloat16), weight[places], RELATIVE[torch.bfloat16])


SMALL = BlockConfig(32, 1)  # a row in several steps, the last one masked


def test_small_blocks_give_the_same():
    """Whatever config a launch gets."""
    case = CASES[0]
    schedule = kernels.build_schedule(case.slots, case.num_slots)
    tokens, top_k = case.slots.shape
    y, weights = normal(tokens * top_k, 90, dtype=torch.float32), normal(tokens, top_k, dtype=torch.float32)
    assert kernels.unpermute(y, weights, schedule, config=SMALL).equal(kernels.unpermute(y, weights, schedule))

    h, form = normal(5, 180, dtype=torch.float32), ExpertForm()
    assert kernels.swiglu(h, form, config=SMALL).equal(kernels.swiglu(h, form))
    both = (kernels.swiglu_backward(y[:5], h, form, config=c) for c in (SMALL, None))
    assert all(a.equal(b) for a, b in zip(*both, strict=True))

    grad, shards, place = torch.zeros(3, 90), normal(2, 90, dtype=torch.float32), torch.tensor([2, 2])
    kernels.replica_reduce(grad, shards, place, config=SMALL)
    assert grad[2].equal(shards[0] + shards[1]) and not grad[:2].any()
    assert kernels.pack_replicas(grad, place, config=SMALL).equal(grad[place])


@pytest.mark.parametrize("config", [BlockConfig(32, 1, 2), BlockConfig(64, 1, 128), None], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bias_gradients(case, config):
    """Poisoned buffers where they are overwritten; slots of one weight are summed, the last of which has no rows."""
    num_slots = case.num_slots + 1
    schedule = kernels.build_schedule(case.slots, num_slots)
    used, (tokens, top_k) = int(schedule.slot_offsets[-1]), case.slots.shape
    rows = normal(tokens * top_k, 90, dtype=torch.float32)
    rows[used:] = float("nan")
    expected, got = torch.zeros(num_slots, 90).double(), torch.full((num_slots, 90), float("nan"))
    reference.grad_bias(rows.double(), schedule, expected)
    kernels.grad_bias(rows, schedule, got, accumulate=False, config=config)
    assert_close(got, expected, 1e-5)
    kernels.grad_bias(rows, schedule, got, config=config)
    assert_close(got, 2 * expected, 1e-5)

    dout, weights = normal(tokens, 90, dtype=torch.float32), normal(tokens, top_k, dtype=torch.float32, seed=1)
    one = torch.zeros(num_slots, dtype=torch.int32)  # all slots are of weight 0
    expected, got = torch.zeros(1, 90).double(), torch.zeros(1, 90)
    how = {"gather": True, "weight_of_slot": one}
    reference.grad_bias(dout.double(), schedule, expected, weights_TK=weights.double(), **how)
    kernels.grad_bias(dout, schedule, got, weights_TK=weights, config=config, **how)
    assert_close(got, expected, 1e-5)


def test_products_beyond_32_bits():
    """Row 2^18 + 3 of 8192 elements starts past 2^31. The memory is reserved, and only the rows in use are touched."""
    width, row = 8192, (1 << 18) + 3
    y = reserved(row + 1, width, dtype=torch.float16)
    y[row] = 1.5
    out = torch.zeros(1, width, dtype=torch.float16)
    _unpermute_kernel[(1,)](y, None, torch.tensor([[row]]).int(), out, H=width, TOP_K=1, BLOCK_H=2048)
    assert out.eq(1.5).all()


def reserved(*shape, dtype):
    """A tensor whose memory is reserved but not touched."""
    storage = torch.UntypedStorage(math.prod(shape) * dtype.itemsize)
    return torch.tensor([], dtype=dtype).set_(storage).view(shape)


def test_tokens_beyond_32_bits(monkeypatch):
    """Token 2^18 + 3 of 8192 elements starts past 2^31 in every tensor by token. Only its program runs."""
    width, token, top_k = 8192, (1 << 18) + 3, 2
    monkeypatch.setattr(
        interpreter.interpreter_builder,
        "create_get_program_id",
        lambda axis: interpreter.TensorHandle(np.array([token], dtype=np.int32), tl.int32),
    )
    position = reserved(token + 1, top_k, dtype=torch.int32)
    position[token] = torch.tensor([1, 0])
    weights = reserved(token + 1, top_k, dtype=torch.float32)
    weights[token] = torch.tensor([2.0, 3.0])
    sizes = {"H": width, "TOP_K": top_k, "BLOCK_H": 2048}

    y = torch.stack([torch.full((width,), value, dtype=torch.float16) for value in (0.25, 0.5)])
    out = reserved(token + 1, width, dtype=torch.float16)
    _unpermute_kernel[(1,)](y, weights, position, out, **sizes)
    assert out[token].eq(2 * 0.5 + 3 * 0.25).all()


def test_wrong_rows_are_refused():
    schedule = kernels.build_schedule(torch.tensor([[0, 1]]), 2)
    with pytest.raises(ShapeError, match="contiguous with 2 rows"):
        kernels.unpermute(torch.zeros(1, H), None, schedule)
    with pytest.raises(ShapeError, match="contiguous with 2 rows"):
        kernels.unpermute(torch.zeros(H, 2).t(), None, schedule)
    rows = torch.zeros(2, H)
    with pytest.raises(ShapeError, match="weights is"):
        kernels.unpermute(rows, torch.ones(1, 1), schedule)
    with pytest.raises(ShapeError, match="contiguous"):
        kernels.replica_reduce(torch.zeros(4, 6), torch.zeros(6, 2).t(), torch.tensor([0, 1]))
