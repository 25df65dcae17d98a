"""Replicas that stay from forward to backward: how many are alive when, on every rank of a group."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from toy_training import Case, loss_sum, make_batch, make_plan, model_input, start

from relibra_kernels.parallel import RoutedBatch
from relibra_kernels.parallel.experts.replicas import Push
from relibra_kernels.parallel.tokens import layer
from relibra_kernels.weights import ExpertWeights


def lives_of_replicas(case: Case) -> list[int]:
    """How many layers' replicas are alive after each moment of a batch, the last of them after it."""
    ep, optimizer = start(case)
    trace, groups, tokens = make_batch(case, 0)
    mine = np.arange(dist.get_rank(), trace.num_sequences, case.ranks)
    trace, groups = trace.select(mine), groups[mine]
    plan = make_plan(case, ep, RoutedBatch(trace, groups, case.micro_batches), 0)
    with weights_of_pushes() as stores:
        moments: list[int] = []

        def forward(m: int) -> torch.Tensor:
            ids, rows, counted = model_input(case, trace, tokens, mine, np.flatnonzero(groups == m))
            with ep.micro_batch(m, rows):
                return loss_sum(ep.model(ids), ids, counted)

        def look() -> None:
            gc.collect()
            moments.append(sum(store() is not None for store in stores))

        with ep.batch(plan, trace, groups, optimizer):
            with torch.no_grad():
                forward(0)
            look()
            first, again, other, unused = forward(0), forward(0), forward(1), forward(1)
            look()
            first.backward()
            look()
            other.backward()
            again.backward()
            look()
        del unused
        look()
    return moments


def lives_of_kept_replicas(case: Case) -> tuple[bool, bool]:
    """Whether the weights of kept replicas are alive in a batch, and after it."""
    ep, optimizer = start(case)
    trace, groups, _ = make_batch(case, 0)
    mine = np.arange(dist.get_rank(), trace.num_sequences, case.ranks)
    plan = make_plan(case, ep, RoutedBatch(trace.select(mine), groups[mine], case.micro_batches), 0)
    with ep.batch(plan, trace.select(mine), groups[mine], optimizer):
        kept = weakref.ref(ep._runner.batch._kept.weights(0).gate_up)
        within = kept() is not None
    ep.stats()  # of the batch that is over
    return within, kept() is not None


def copied_of_kept_replicas(case: Case) -> int:
    """How many layers, forward and backward of a batch, compute with or add up kept replicas anywhere else."""
    ep, optimizer = start(case)
    trace, groups, tokens = make_batch(case, 0)
    mine = np.arange(dist.get_rank(), trace.num_sequences, case.ranks)
    trace, groups = trace.select(mine), groups[mine]
    plan = make_plan(case, ep, RoutedBatch(trace, groups, case.micro_batches), 0)
    elsewhere, seen = 0, 0
    forward, backward = layer.moe_mlp_forward, layer.moe_mlp_backward

    def held_by(stores: dict[int, ExpertWeights], used: ExpertWeights) -> bool:
        return any(used.gate_up is store.gate_up for store in stores.values())

    def look(function, *args, **options):
        nonlocal elsewhere, seen
        kept = ep._runner.batch._kept
        is_kept = held_by(kept._weights, options["replica"])
        if "replica_grad" in options:
            is_kept = is_kept and held_by(kept._gradients, options["replica_grad"])
        elsewhere, seen = elsewhere + (not is_kept), seen + 1
        return function(*args, **options)

    layer.moe_mlp_forward, layer.moe_mlp_backward = partial(look, forward), partial(look, backward)
    try:
        with ep.batch(plan, trace, groups, optimizer):
            for m in range(case.micro_batches):
                ids, rows, counted = model_input(case, trace, tokens, mine, np.flatnonzero(groups == m))
                with ep.micro_batch(m, rows):
                    loss_sum(ep.model(ids), ids, counted).backward()
    finally:
        layer.moe_mlp_forward, layer.moe_mlp_backward = forward, backward
    assert seen == 2 * case.layers * case.micro_batches
    return elsewhere


@contextmanager
def weights_of_pushes() -> Iterator[list["weakref.ref[torch.Tensor]"]]:
    """References to one weight of everything that is pushed within."""
    stores: list[weakref.ref[torch.Tensor]] = []
    original = Push.wait

    def wait(push: Push):
        weights = original(push)
        stores.append(weakref.ref(weights.gate_up))
        return weights

    Push.wait = wait
    try:
        yield stores
    finally:
        Push.wait = original
