"""Homes and replicas wherever they lie in memory: the same bits, with descriptors and without."""

import dataclasses
import importlib

import layer_problem
import pytest
import torch
from layer_problem import FORMS, REPLICAS, problem

from relibra_kernels.autograd import moe_mlp_backward, moe_mlp_forward
from relibra_kernels.configs.config import GemmConfig
from relibra_kernels.kernels import launch
from relibra_kernels.kernels.stores import two_stores
from relibra_kernels.ops import build_schedule
from relibra_kernels.weights import ExpertWeights, replica_store


def placed(home, replica, where):
    """Copies of both: replicas after the homes, before them, or 16 bytes further than a whole number of experts."""
    size = home[0].numel()
    gap = 16 // home.element_size() if where == "misplaced" else 2 * size
    first, second = (replica, home) if where == "before" else (home, replica)
    memory = torch.full((first.numel() + gap + second.numel() + size,), 7.0, dtype=home.dtype)
    lower = memory[: first.numel()].view(first.shape).copy_(first)
    upper = memory[first.numel() + gap :][: second.numel()].view(second.shape).copy_(second)
    return (upper, lower) if where == "before" else (lower, upper)


def run(form, p, where):
    """Out, dx, gate gradients and the gradients of homes and replicas, all placed like the weights."""
    schedule = build_schedule(REPLICAS.slots, REPLICAS.num_slots)
    pairs = [
        placed(*pair, where) for pair in zip(p.home(REPLICAS).tensors(), p.replica(REPLICAS).tensors(), strict=True)
    ]
    sums = [placed(a.float() * 0 + 0.5, b.float() * 0 + 0.5, where) for a, b in pairs]
    home, replica = (ExpertWeights(*side) for side in zip(*pairs, strict=True))
    grad, replica_grad = (ExpertWeights(*side) for side in zip(*sums, strict=True))
    how = {"replica": replica, "weight_of_slot": REPLICAS.weight_of_slot}
    out, h = moe_mlp_forward(p.x, p.weights, schedule, home, form, **how)
    into = {"grad": grad, "replica_grad": replica_grad}
    dx, dweights = moe_mlp_backward(p.dout, p.x, h, p.weights, schedule, home, form, **into, **how)
    return [out, dx, dweights, *grad.tensors(), *replica_grad.tensors()]


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("name", ["qwen", "gpt-oss"])
def test_the_same_bits_wherever_the_replicas_lie(name, tma, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETER", dataclasses.replace(launch.INTERPRETER, tma=tma))
    p = problem(REPLICAS, FORMS[name], torch.float16)
    first, *others = (run(FORMS[name], p, where) for where in ("after", "before", "misplaced"))
    for other in others:
        assert all(a.equal(b) for a, b in zip(first, other, strict=True))


def test_the_same_bits_where_the_last_tile_is_half_as_wide(monkeypatch):
    """Every store has a descriptor of half a tile too: of 264 columns in grad_hidden, of 528 in grad_weight."""
    monkeypatch.setattr(layer_problem, "I", 264)
    for name in ("grad_hidden", "grad_weight"):
        module = importlib.import_module(f"relibra_kernels.kernels.{name}")
        monkeypatch.setattr(module, "chosen_config", lambda *args, **how: GemmConfig(32, 256, 16, 4, 1))
    test_the_same_bits_wherever_the_replicas_lie("gpt-oss", True, monkeypatch)


def test_how_two_stores_are_numbered():
    home, replica = torch.zeros(3, 4, 8), torch.zeros(2, 4, 8)
    after, before = two_stores(*placed(home, replica, "after")), two_stores(*placed(home, replica, "before"))
    assert after.other is None and after.arguments == (0, 5, 7)
    assert before.other is None and before.arguments == (4, 0, 7)
    assert two_stores(*placed(home, replica, "misplaced")).other is not None
    assert two_stores(home, None).arguments == (0, 0, 3)


def test_a_store_that_is_made_for_it_lies_whole_experts_away():
    for skip in (0, 4, 13):
        home = torch.zeros(3 * 32 + skip)[skip:].view(3, 4, 8)
        store = replica_store(home, 2)
        assert store.shape == (2, 4, 8) and store.is_contiguous()
        assert (store.data_ptr() - home.data_ptr()) % (32 * 4) == 0
        assert replica_store(home, 0).shape == (0, 4, 8)
