"""The whole layer on the kernels, forward and backward, against the float64 oracle: every GEMM kernel is in it."""

import dataclasses

import layer_problem
import pytest
import torch
from layer_problem import CASES, FORMS, REPLICAS, oracle, problem, run_functions
from tolerance import RELATIVE, assert_close

from relibra_kernels import kernels, reference
from relibra_kernels.configs.config import GemmConfig
from relibra_kernels.form import ExpertForm
from relibra_kernels.kernels import launch
from relibra_kernels.planner.errors import ShapeError
from relibra_kernels.schedule import Schedule

ACTIVATIONS = ("clamped silu", "capped silu", "gelu", "no gate", "no gate, transposed, bias")


def check(case, form, dtype, adapted=()):
    p = problem(case, form, dtype, adapted=adapted)
    got = run_functions(case, form, p)
    expected = oracle(case, form, p)
    names = ("out", "dx", "dweights", *(f"gradient {i}" for i in range(8)))
    for name, a, b in zip(names, (*got[:3], *got[3]), (*expected[:3], *expected[3]), strict=False):
        assert_close(a, b, RELATIVE[dtype], name)
    return got


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_routing_in_fp32(case):
    check(case, FORMS["qwen"], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    check(REPLICAS, FORMS["qwen"], dtype)


@pytest.mark.parametrize("name", ["bias", "interleaved", "transposed", "clamped", "gpt-oss", *ACTIVATIONS])
def test_every_form(name):
    check(CASES[3], FORMS[name], torch.float32)


@pytest.mark.parametrize("name", ["qwen", "gpt-oss", "no gate"])
def test_low_rank_terms(name):
    check(REPLICAS, FORMS[name], torch.float32, adapted=("gate_up", "down"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_routing_without_a_gate(case):
    check(case, FORMS["no gate, transposed, bias"], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_without_a_gate(dtype):
    check(REPLICAS, FORMS["no gate"], dtype)


@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(24, 37), (40, 1), (16, 130)])
def test_odd_sizes_without_a_gate(hidden_size, intermediate_size, monkeypatch):
    """A tile has twice a config's columns of up, so an odd number of them, one column and several tiles."""
    monkeypatch.setattr(layer_problem, "H", hidden_size)
    monkeypatch.setattr(layer_problem, "I", intermediate_size)
    for name in ("no gate", "no gate, transposed, bias"):
        check(REPLICAS, FORMS[name], torch.float32)


def test_wide_tiles_without_a_gate():
    """From 128 rows a tile on, its halves of up columns are stored one after the other."""
    form, generator = ExpertForm(activation="relu2"), torch.Generator().manual_seed(0)
    x, up = torch.randn(300, 24, generator=generator), torch.randn(3, 69, 24, generator=generator)
    schedule = kernels.build_schedule(torch.arange(300)[:, None] % 3, 3, (128,))
    got = kernels.grouped_gemm_swiglu(x, up, schedule, form, config=GemmConfig(128, 16, 16, 4, 1))
    for mine, expected in zip(got, reference.grouped_gemm_swiglu(x.double(), up.double(), schedule, form), strict=True):
        assert_close(mine, expected, 1e-5)


def test_replicas_with_biases():
    check(REPLICAS, FORMS["gpt-oss"], torch.float32)


@pytest.mark.parametrize("gather", [False, True], ids=["pointer gather", "descriptor gather"])
@pytest.mark.parametrize("name", ["qwen", "gpt-oss", "no gate"])
@pytest.mark.parametrize("replicas", [False, True])
def test_descriptors(monkeypatch, gather, name, replicas):
    """sm_90: descriptors, gathered rows by pointer, flattened loops over tiles. sm_100: descriptor gather."""
    family = "blackwell" if gather else "hopper"
    device = dataclasses.replace(launch.INTERPRETER, tma=True, descriptor_gather=gather, family=family)
    monkeypatch.setattr(launch, "INTERPRETER", device)
    check(REPLICAS if replicas else CASES[3], FORMS[name], torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_amd(monkeypatch, dtype):
    """32-bit offsets, tiles of grouped_gemm stored in halves, chiplets."""
    device = dataclasses.replace(launch.INTERPRETER, backend="hip", xcds=2, family="cdna3")
    monkeypatch.setattr(launch, "INTERPRETER", device)
    check(REPLICAS, FORMS["gpt-oss"], dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [32, 40, 72])
def test_specialised_warps(monkeypatch, transposed, width):
    """Blackwell: loops over tiles flattened, both operands by descriptors, tiles stored in halves."""
    device = dataclasses.replace(launch.INTERPRETER, tma=True, descriptor_gather=True, family="blackwell")
    monkeypatch.setattr(launch, "INTERPRETER", device)
    generator = torch.Generator().manual_seed(0)
    schedule = kernels.build_schedule(torch.tensor([[0], [3], [3], [0], [3]] * 7), 4, (16,))  # slots 1 and 2 are empty
    a = torch.randn(35, 40, generator=generator).half()
    weight = torch.randn(4, *((width, 40) if transposed else (40, width)), generator=generator).half()
    bias = torch.randn(4, width, generator=generator).half()
    config = GemmConfig(16, 32, 16, 4, 1, is_specialised=True)
    got = kernels.grouped_gemm(a, weight, schedule, transpose_weight=transposed, bias=bias, config=config)
    expected = reference.grouped_gemm(
        a.double(), weight.double(), schedule, transpose_weight=transposed, bias=bias.double()
    )
    assert_close(got, expected, RELATIVE[torch.float16])


def test_same_input_same_bits_whatever_the_grid(monkeypatch):
    case, form = CASES[1], FORMS["qwen"]
    p = problem(case, form, torch.float32)
    first = run_functions(case, form, p)
    monkeypatch.setattr(launch, "INTERPRETER", dataclasses.replace(launch.INTERPRETER, programs=5, xcds=2))
    second = run_functions(case, form, p)
    for a, b in zip((*first[:3], *first[3]), (*second[:3], *second[3]), strict=True):
        assert a.equal(b)


def test_overwriting_zeroes_what_no_row_uses():
    schedule = kernels.build_schedule(CASES[1].slots, 6)
    left, right = torch.randn(schedule.num_rows, 24), torch.randn(schedule.num_rows, 20)
    grad = torch.full((6, 24, 20), float("nan"))
    kernels.grad_weight(left, right, schedule, grad, accumulate=False)
    offsets = schedule.slot_offsets.tolist()
    for slot in range(6):
        rows = slice(offsets[slot], offsets[slot + 1])
        assert_close(grad[slot], left[rows].double().T @ right[rows].double(), 1e-5)


def test_weights_beyond_32_bits():
    """Weight number 2^23 of 256 elements starts at element 2^31."""
    number = 1 << 23
    storage = torch.UntypedStorage((number + 1) * 256 * 2)
    weight = torch.tensor([], dtype=torch.float16).set_(storage).view(number + 1, 16, 16)
    weight[number] = torch.eye(16) * 2
    schedule = kernels.build_schedule(torch.tensor([[0], [0]]), 1, (16,))
    a, table = torch.randn(2, 16).half(), torch.tensor([number], dtype=torch.int32)
    out = kernels.grouped_gemm(a, weight, schedule, transpose_weight=True, weight_of_slot=table)
    assert out.equal(2 * a)


def test_rows_beyond_32_bits(monkeypatch):
    """Row 2^18 of 8192 columns starts at element 2^31. The memory is reserved, and only the row in use is touched."""
    far, width = 1 << 18, 8192
    storage = torch.UntypedStorage((far + 1) * width * 2)
    reserved = torch.tensor([], dtype=torch.float16).set_(storage).view(far + 1, width)
    index = {"dtype": torch.int32}
    assignment_of, position_of = torch.full((far + 1,), -1, **index), torch.full((far + 1, 1), -1, **index)
    assignment_of[far], position_of[0] = 0, far
    tiles = {16: torch.tensor([[0, far]], **index)}
    schedule = Schedule(torch.tensor([far, far + 1], **index), assignment_of, position_of, tiles)
    a, weight = torch.zeros(far + 1, 16, dtype=torch.float16), torch.randn(1, width, 16).half()
    a[far] = torch.randn(16)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *size, **how: reserved if width in size else new_empty(self, *size, **how),
    )
    out = kernels.grouped_gemm(a, weight, schedule, transpose_weight=True)
    assert_close(out[far], a[far].double() @ weight[0].double().T, RELATIVE[torch.float16])


def test_wrong_operands_are_refused():
    schedule = kernels.build_schedule(torch.tensor([[0], [1]]), 2, (16,))
    weight = torch.zeros(2, 16, 16)
    with pytest.raises(ShapeError, match=r"contiguous torch\.float16"):
        kernels.grouped_gemm(torch.zeros(2, 16).half(), weight, schedule, transpose_weight=True)
    with pytest.raises(ShapeError, match="contiguous"):
        kernels.grouped_gemm(torch.zeros(16, 2).t(), weight, schedule, transpose_weight=True)
    with pytest.raises(ShapeError, match="float32"):
        kernels.grad_weight(torch.zeros(2, 16), torch.zeros(2, 16), schedule, weight.half())
    with pytest.raises(ShapeError, match="must be the same"):
        kernels.grad_weight(torch.zeros(2, 16), torch.zeros(2, 16).half(), schedule, weight)


def test_a_tile_size_can_be_given():
    schedule = kernels.build_schedule(torch.tensor([[0, 1], [1, 0], [1, 2]]), 3)  # without its table of tiles
    a, weight = torch.randn(6, 24), torch.randn(3, 40, 24)
    config = GemmConfig(32, 16, 16, 4, 1)
    out = kernels.grouped_gemm(a, weight, schedule, transpose_weight=True, config=config)
    assert_close(out[2:5], a[2:5].double() @ weight[1].double().T, 1e-5)
    assert ExpertForm() == FORMS["qwen"]


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_both_of_torchs_settings_of_fp32_products(setting):
    """Once the newer setting was used, reading the older one raises."""
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = setting
    try:
        assert launch.precision(torch.float32) == setting
        assert launch.precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = "ieee"
