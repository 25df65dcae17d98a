"""grad_hidden and grad_weight where the columns leave a last tile at most half full: it is computed at half width."""

import dataclasses
import importlib

import pytest
import torch
from layer_problem import FORMS, REPLICAS
from tolerance import RELATIVE, assert_close

from relibra_kernels import kernels, reference
from relibra_kernels.configs.config import parse_config
from relibra_kernels.kernels import launch

HALVES = {1: True, 127: True, 128: True, 129: False, 256: False, 257: True, 384: True, 385: False, 520: True}
HOMES, WIDE, NARROW = REPLICAS.num_home, parse_config("32x256x64w4s1"), parse_config("32x128x64w4s1")
WEIGHTS = HOMES + REPLICAS.num_replicas
DEVICES = {
    "pointers": {},
    "descriptors": {"tma": True, "family": "hopper"},
    "descriptor gather": {"tma": True, "family": "blackwell", "descriptor_gather": True},
}


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETER", dataclasses.replace(launch.INTERPRETER, **DEVICES[request.param]))


@pytest.fixture
def halves(monkeypatch):
    """Of every launch, whether its last tile is half as wide as the others."""
    found = []
    for name in ("grad_hidden", "grad_weight"):
        module = importlib.import_module(f"relibra_kernels.kernels.{name}")

        def noted(kernel, grid, *args, whole=module.launch, **options):
            found.extend([options["HALF_LAST"]] if "HALF_LAST" in options else [])
            whole(kernel, grid, *args, **options)

        monkeypatch.setattr(module, "launch", noted)
    return found


def normal(*size, dtype, seed):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grad_hidden(where, form, intermediate_size, dtype=torch.float32, hidden_size=24, with_replicas=True, **config):
    """dh, w*a and the gate weights' gradients, by the kernels or by the reference in float64."""
    kind = torch.float64 if where is reference else dtype
    tokens, rows = REPLICAS.slots.shape[0], REPLICAS.slots.numel()
    down = normal(WEIGHTS, *form.down_shape(hidden_size, intermediate_size), dtype=dtype, seed=0).to(kind)
    bias = normal(WEIGHTS, hidden_size, dtype=dtype, seed=1).to(kind) if form.has_bias else None
    dout = normal(tokens, hidden_size, dtype=dtype, seed=2).to(kind)
    h = normal(rows, form.width(intermediate_size), dtype=dtype, seed=3).to(kind)
    gates = normal(*REPLICAS.slots.shape, dtype=dtype, seed=4).to(kind)
    stores = {"bias": bias}
    if with_replicas:
        stores = {
            "bias": None if bias is None else bias[:HOMES],
            "replica_down": down[HOMES:],
            "replica_bias": None if bias is None else bias[HOMES:],
        }
        down = down[:HOMES]
    schedule = where.build_schedule(REPLICAS.slots, REPLICAS.num_slots)
    table = {"weight_of_slot": REPLICAS.weight_of_slot}
    return where.grad_hidden(dout, h, gates, down, schedule, form, **stores, **table, **config)


@pytest.mark.parametrize("intermediate_size", HALVES)
@pytest.mark.parametrize("name", ["qwen", "no gate"])
def test_columns_of_grad_hidden(name, intermediate_size, halves):
    got = grad_hidden(kernels, FORMS[name], intermediate_size, config=WIDE)
    for mine, right in zip(got, grad_hidden(reference, FORMS[name], intermediate_size), strict=True):
        assert_close(mine, right, RELATIVE[torch.float32])
    assert halves == [HALVES[intermediate_size]]


@pytest.mark.parametrize("with_replicas", [True, False])
@pytest.mark.parametrize("name", ["gpt-oss", "bias", "no gate, transposed, bias"])
def test_forms_of_grad_hidden(name, with_replicas, device, halves):
    """264 columns: a whole tile and a half one of 8, which are 16 bytes."""
    how = {"dtype": torch.float16, "with_replicas": with_replicas}
    got = grad_hidden(kernels, FORMS[name], 264, config=WIDE, **how)
    for mine, right in zip(got, grad_hidden(reference, FORMS[name], 264, **how), strict=True):
        assert_close(mine, right, RELATIVE[torch.float16])
    assert halves == [True]


def grad_weight(where, columns, dtype=torch.float32, accumulate=True, with_replicas=True, gather=False, **config):
    """The gradients of homes, then of replicas."""
    kind, grad_kind = (torch.float64, torch.float64) if where is reference else (dtype, torch.float32)
    schedule = where.build_schedule(REPLICAS.slots, REPLICAS.num_slots)
    rows = REPLICAS.slots.shape[0] if gather else REPLICAS.slots.numel()
    left = normal(REPLICAS.slots.numel(), 40, dtype=dtype, seed=5).to(kind)
    right = normal(rows, columns, dtype=dtype, seed=6).to(kind)
    grad = torch.full((WEIGHTS, 40, columns), 0.5 if accumulate else float("nan"), dtype=grad_kind)
    stores = {"replica_grad": grad[HOMES:] if with_replicas else None, "weight_of_slot": REPLICAS.weight_of_slot}
    how = {"gather_right": gather, "accumulate": accumulate}
    where.grad_weight(left, right, schedule, grad[:HOMES] if with_replicas else grad, **stores, **how, **config)
    return grad


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("columns", HALVES)
def test_columns_of_grad_weight(columns, accumulate, halves):
    got = grad_weight(kernels, columns, accumulate=accumulate, config=WIDE)
    assert_close(got, grad_weight(reference, columns, accumulate=accumulate), RELATIVE[torch.float32])
    assert halves == [HALVES[columns]]


@pytest.mark.parametrize("with_replicas", [True, False])
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("gather", [True, False])
def test_loads_of_grad_weight(gather, accumulate, with_replicas, device, halves):
    how = {"dtype": torch.float16, "accumulate": accumulate, "with_replicas": with_replicas, "gather": gather}
    assert_close(grad_weight(kernels, 264, config=WIDE, **how), grad_weight(reference, 264, **how), 1e-5)
    assert halves == [True]


def test_a_half_tile_has_the_bits_of_narrow_ones(halves):
    """Columns are added up alike, however many are computed beside them."""
    first = grad_weight(kernels, 384, config=WIDE), *grad_hidden(kernels, FORMS["qwen"], 384, config=WIDE)[:2]
    second = grad_weight(kernels, 384, config=NARROW), *grad_hidden(kernels, FORMS["qwen"], 384, config=NARROW)[:2]
    assert halves == [True, True, False, False] and all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_same_bits_whatever_the_grid(monkeypatch):
    first = grad_hidden(kernels, FORMS["gpt-oss"], 384, config=WIDE)
    monkeypatch.setattr(launch, "INTERPRETER", dataclasses.replace(launch.INTERPRETER, programs=5, xcds=2))
    assert all(a.equal(b) for a, b in zip(first, grad_hidden(kernels, FORMS["gpt-oss"], 384, config=WIDE), strict=True))
