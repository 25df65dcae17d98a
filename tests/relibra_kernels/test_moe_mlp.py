"""The MoE MLP, forward and backward, against a float64 oracle: every routing shape, every form."""

import importlib

import pytest
import torch
from layer_problem import CASES, FORMS, REPLICAS, H, I, oracle, problem, run_functions
from routing import random_slots
from tolerance import RELATIVE, assert_close

from relibra_kernels import ops
from relibra_kernels.autograd import moe_mlp, moe_mlp_backward, moe_mlp_forward
from relibra_kernels.form import GPT_OSS, ExpertForm
from relibra_kernels.ops import build_schedule
from relibra_kernels.planner.errors import ShapeError
from relibra_kernels.weights import ExpertWeights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_routing(case, dtype):
    form = FORMS["qwen"]
    p = problem(case, form, dtype)
    out, dx, dweights, grads = run_functions(case, form, p)
    expected_out, expected_dx, expected_dweights, expected_grads = oracle(case, form, p)
    tolerance = RELATIVE[dtype]
    assert out.dtype == dx.dtype == dtype
    assert dweights.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(out, expected_out, tolerance, "out")
    assert_close(dx, expected_dx, tolerance, "dx")
    assert_close(dweights, expected_dweights, tolerance, "dweights")
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected, tolerance, "weight gradient")


@pytest.mark.parametrize("operand", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_in_either_dtype_and_in_pieces(case, accumulate, operand, monkeypatch):
    """Whatever this CPU would choose: bf16 as it is, and cast to fp32, with slots cut into pieces of 3 rows."""
    products = importlib.import_module("relibra_kernels.reference.grouped_gemm")  # the function has that name too
    monkeypatch.setattr(products, "operand_dtype", lambda tensor: operand)
    monkeypatch.setattr(products, "CHUNK_ROWS", 3)
    form = FORMS["bias"]
    p = problem(case, form, torch.bfloat16)
    out, dx, dweights, grads = run_functions(case, form, p, accumulate=accumulate)
    expected_out, expected_dx, expected_dweights, expected_grads = oracle(case, form, p)
    pairs = zip(
        (out, dx, dweights, *grads), (expected_out, expected_dx, expected_dweights, *expected_grads), strict=True
    )
    for got, expected in pairs:
        assert_close(got, expected, RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("name", FORMS)
def test_every_form(name):
    form, case = FORMS[name], REPLICAS
    p = problem(case, form, torch.float32)
    out, dx, dweights, grads = run_functions(case, form, p)
    expected_out, expected_dx, expected_dweights, expected_grads = oracle(case, form, p)
    assert_close(out, expected_out, 1e-5, "out")
    assert_close(dx, expected_dx, 1e-5, "dx")
    assert_close(dweights, expected_dweights, 1e-5, "dweights")
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected, 1e-5, "weight gradient")


@pytest.mark.parametrize("adapted", [("gate_up", "down"), ("gate_up",), ("down",)], ids="+".join)
@pytest.mark.parametrize("name", FORMS)
def test_low_rank_terms(name, adapted):
    """Beside the weights, of every form, with replicas; all gradients, those of the weights included."""
    check_low_rank(REPLICAS, FORMS[name], torch.float64, adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_low_rank_terms_of_every_routing(case, dtype):
    check_low_rank(case, FORMS["qwen"], dtype, ("gate_up", "down"))


def check_low_rank(case, form, dtype, adapted):
    p = problem(case, form, dtype, adapted=adapted)
    out, dx, dweights, grads = run_functions(case, form, p)
    expected_out, expected_dx, expected_dweights, expected_grads = oracle(case, form, p)
    assert len(grads) == 2 + 2 * form.has_bias + 2 * len(adapted)
    assert out.dtype == dx.dtype == dtype and dweights.dtype == torch.promote_types(dtype, torch.float32)
    got, expected = (out, dx, dweights, *grads), (expected_out, expected_dx, expected_dweights, *expected_grads)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, RELATIVE[dtype])


def test_frozen_weights_have_no_gradient_buffer(monkeypatch):
    """Only the factors' gradients are computed: no buffer of a weight's size is made, and no product for one."""
    form, case = FORMS["qwen"], CASES[0]
    p = problem(case, form, torch.float32, adapted=("gate_up", "down"))
    leaves = p.stores.map(lambda tensor: tensor.requires_grad_(tensor.shape[1] == 3 or tensor.shape[2] == 3))
    made = []
    whole = ops.grad_weight
    monkeypatch.setattr(ops, "grad_weight", lambda *args, **how: (made.append(args[3].shape), whole(*args, **how)))
    schedule = build_schedule(case.slots, case.num_slots)
    moe_mlp(p.x, p.weights, schedule, leaves, form).backward(p.dout)
    assert sorted(made) == sorted(tensor.shape for tensor in leaves[4:])
    expected = dict(zip(ExpertWeights._fields[4:], oracle(case, form, p)[-1][2:], strict=True))
    for name, leaf in leaves._asdict().items():
        if name in expected:
            assert_close(leaf.grad, expected[name], 1e-5, name)
        elif leaf is not None:
            assert leaf.grad is None


def test_factors_that_do_not_fit_are_refused():
    form, case = FORMS["qwen"], REPLICAS
    p = problem(case, form, torch.float32, adapted=("down",))
    schedule, home, replica = build_schedule(case.slots, case.num_slots), p.home(case), p.replica(case)
    for wrong in (
        {"down_left": None},
        {"down_left": home.down_left[:, :, :2]},
        {"down_right": home.down_right[:, :, :-1]},
        {"down_left": home.down_left[:, :, :0], "down_right": home.down_right[:, :0]},
    ):
        with pytest.raises(ShapeError, match="the home factors of down are"):
            moe_mlp_forward(p.x, p.weights, schedule, home._replace(**wrong), form)
    bare = ExpertWeights(replica.gate_up, replica.down)
    with pytest.raises(ShapeError, match=r"'down_right'\] and the replica weights \['gate_up', 'down'\]"):
        how = {"replica": bare, "weight_of_slot": case.weight_of_slot}
        moe_mlp_forward(p.x, p.weights, schedule, home, form, **how)


def test_gradients_are_added_to_the_buffers():
    form, case = FORMS["bias"], CASES[0]
    p = problem(case, form, torch.float32)
    from_zero = run_functions(case, form, p)[-1]
    from_three = run_functions(case, form, p, start=3.0)[-1]
    for zero, three in zip(from_zero, from_three, strict=True):
        assert_close(three, zero + 3.0, 1e-6)


def test_overwriting_ignores_what_the_buffers_held():
    """`accumulate=False`: NaN in the buffers is gone, experts without rows have zeros, bf16 buffers work."""
    form, case = FORMS["bias"], CASES[1]
    p = problem(case, form, torch.bfloat16)
    schedule = build_schedule(case.slots, case.num_slots)
    _, h = moe_mlp_forward(p.x, p.weights, schedule, p.stores, form)
    grad = p.stores.map(lambda tensor: torch.full_like(tensor, float("nan")))
    moe_mlp_backward(p.dout, p.x, h, p.weights, schedule, p.stores, form, grad=grad, accumulate=False)
    for got, expected in zip(grad.tensors(), oracle(case, form, p)[3], strict=True):
        assert_close(got, expected, RELATIVE[torch.bfloat16])
        assert not got[1].any()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[6]], ids=str)
def test_autograd(case, recompute):
    form = FORMS["bias"]
    p = problem(case, form, torch.float32)
    leaves = [tensor.clone().requires_grad_() for tensor in (p.x, p.weights, *p.stores.tensors())]
    schedule = build_schedule(case.slots, case.num_slots)
    out = moe_mlp(leaves[0], leaves[1], schedule, ExpertWeights(*leaves[2:]), form, recompute=recompute)
    out.backward(p.dout)
    expected_out, expected_dx, expected_dweights, expected_grads = oracle(case, form, p)
    assert_close(out.detach(), expected_out, 1e-5)
    for leaf, expected in zip(leaves, [expected_dx, expected_dweights, *expected_grads], strict=True):
        assert_close(leaf.grad, expected, 1e-5)


def test_gradcheck():
    """Autograd against finite differences, in float64."""
    form, case = GPT_OSS, CASES[2]
    p = problem(case, form, torch.float64)
    schedule = build_schedule(case.slots, case.num_slots)
    leaves = [tensor.clone().requires_grad_() for tensor in (p.x, p.weights, *p.stores.tensors())]
    torch.autograd.gradcheck(
        lambda x, weights, *stores: moe_mlp(x, weights, schedule, ExpertWeights(*stores), form), leaves
    )


def test_a_row_of_dropped_assignments_gives_zeros():
    case = CASES[4]
    case.slots[3] = -1
    p = problem(case, FORMS["bias"], torch.float32)
    out, dx, dweights, _ = run_functions(case, FORMS["bias"], p)
    assert not out[3].any() and not dx[3].any() and not dweights[3].any() and out[2].any()


def test_same_input_same_bits():
    case, form = REPLICAS, FORMS["gpt-oss"]
    p = problem(case, form, torch.bfloat16)
    first, second = run_functions(case, form, p), run_functions(case, form, p)
    for a, b in zip((*first[:3], *first[3]), (*second[:3], *second[3]), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("recompute", [False, True])
def test_saved_bytes(recompute):
    """x, h, indices and weights: H + K*2I elements a token and 12 bytes an assignment, nothing of size T*K x H."""
    tokens, top_k, slots, dtype = 512, 4, 8, torch.bfloat16
    x = torch.randn(tokens, H).to(dtype).requires_grad_()
    weights = torch.rand(tokens, top_k).requires_grad_()
    parameters = [torch.randn(slots, *shape).to(dtype).requires_grad_() for shape in ((2 * I, H), (H, I))]
    schedule = build_schedule(random_slots(tokens, top_k, slots), slots)
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe_mlp(x, weights, schedule, ExpertWeights(*parameters), ExpertForm(), recompute=recompute)
    for parameter in parameters:
        del saved[parameter.data_ptr()]
    h_bytes = 0 if recompute else top_k * 2 * I * x.element_size()
    per_token = H * x.element_size() + h_bytes + top_k * (weights.element_size() + 2 * 4)
    assert sum(saved.values()) <= tokens * per_token + 4 * (slots + 1)


def test_main_grad_takes_the_gradient():
    case, form = CASES[0], FORMS["qwen"]
    p = problem(case, form, torch.bfloat16)
    home = p.stores.map(lambda tensor: torch.nn.Parameter(tensor))
    home.gate_up.main_grad = torch.ones(home.gate_up.shape)
    schedule = build_schedule(case.slots, case.num_slots)
    moe_mlp(p.x.requires_grad_(), p.weights, schedule, home, form).backward(p.dout)
    expected = oracle(case, form, p)[3]
    assert home.gate_up.grad is None
    assert_close(home.gate_up.main_grad - 1, expected[0], RELATIVE[torch.bfloat16])
    assert home.down.grad.dtype == torch.bfloat16
    assert_close(home.down.grad, expected[1], RELATIVE[torch.bfloat16])


def test_main_grad_takes_no_gradient_that_is_not_asked_for():
    """Of inputs alone, first, as schedules that split backward do; then of the weight that has none, alone."""
    case, form = CASES[0], FORMS["qwen"]
    p = problem(case, form, torch.float64)
    home = p.stores.map(lambda tensor: torch.nn.Parameter(tensor))
    home.gate_up.main_grad = torch.zeros(home.gate_up.shape, dtype=torch.float64)
    schedule, expected = build_schedule(case.slots, case.num_slots), oracle(case, form, p)[3]
    out = moe_mlp(p.x.requires_grad_(), p.weights, schedule, home, form)
    torch.autograd.grad(out, [p.x], p.dout, retain_graph=True)
    (down,) = torch.autograd.grad(out, [home.down], p.dout, retain_graph=True)
    assert not home.gate_up.main_grad.any()
    assert_close(down, expected[1], RELATIVE[torch.float64])
    out.backward(p.dout)
    assert_close(home.gate_up.main_grad, expected[0], RELATIVE[torch.float64])


def test_what_does_not_fit_is_refused():
    case, form = CASES[0], FORMS["qwen"]
    p = problem(case, form, torch.float32)
    schedule = build_schedule(case.slots, case.num_slots)

    def refuse(match, x=p.x, weights=p.weights, home=p.stores, form=form, **how):
        with pytest.raises(ShapeError, match=match):
            moe_mlp_forward(x, weights, schedule, home, form, **how)

    refuse("must be contiguous", x=p.x.repeat(1, 2)[:, ::2])
    refuse("must be the same", x=p.x.double())
    refuse(r"\[T, K\]", weights=p.weights[:, :1])
    refuse(r"\[E, H, 2I\]", form=ExpertForm(is_transposed=True))
    refuse("biases", form=ExpertForm(has_bias=True))
    refuse("weight_of_slot is None", home=p.stores.map(lambda tensor: tensor[:3]))
    refuse("int32", weight_of_slot=torch.zeros(2, dtype=torch.int32))
    refuse(
        "must be contiguous", home=p.stores._replace(down=p.stores.down.transpose(1, 2).contiguous().transpose(1, 2))
    )


def test_each_function_refuses_what_does_not_fit():
    case, form = CASES[0], FORMS["qwen"]
    p = problem(case, form, torch.float32)
    schedule = build_schedule(case.slots, case.num_slots)
    home, rows = p.stores, torch.zeros(schedule.num_rows, 2 * I)
    with pytest.raises(ShapeError, match=r"a weight is torch\.float64"):
        ops.grouped_gemm_swiglu(p.x, home.gate_up.double(), schedule, form)
    with pytest.raises(ShapeError, match=r"a weight is torch\.bfloat16"):
        ops.grouped_gemm(rows[:, :I].contiguous(), home.down.bfloat16(), schedule, transpose_weight=True)
    with pytest.raises(ShapeError, match="the rows is"):
        ops.grouped_gemm(rows[1:, :I].contiguous(), home.down, schedule, transpose_weight=True)
    with pytest.raises(ShapeError, match="weights is"):
        ops.grad_hidden(p.dout, rows, p.weights[:, :1], home.down, schedule, form)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
@pytest.mark.parametrize("name", ["gate_up", "down", "gate_up_bias", "down_bias"])
def test_quantised_weights_are_refused_by_name(name, dtype):
    """Without their scales they are not the numbers that they look like."""
    case, form = CASES[0], FORMS["bias"]
    p = problem(case, form, torch.float32)
    schedule = build_schedule(case.slots, case.num_slots)
    home = p.stores._replace(**{name: getattr(p.stores, name).to(dtype)})
    with pytest.raises(ShapeError, match=rf"the home {name} is torch\.\w+; it must be one of bfloat16"):
        moe_mlp_forward(p.x, p.weights, schedule, home, form)
