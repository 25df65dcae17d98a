"""Bytes on the wire, counted where tensors are handed to torch.distributed; run on every rank of a group."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from toy_plans import shuffled_plan
from toy_training import Case, ToyModel, loss_sum, make_batch, model_input

from relibra_kernels.parallel import ExpertParallel, RoutedBatch
from relibra_kernels.parallel.comm.collectives import Comm
from relibra_kernels.planner import BatchPlan, ClusterSpec, PlanOptions


def count_wire(case: Case, by_hand: bool = True) -> dict[str, Any]:
    """One batch of bf16 training with fp32 masters: bytes by kind, bytes at the boundary, and what they belong to.

    Args:
        by_hand: False: the plan is the planner's, for full balance.
    """
    rank = dist.get_rank()
    cluster = ClusterSpec(case.ranks // case.gpus_per_node, case.gpus_per_node, case.replica_slots)
    model = ToyModel(case)
    ep = ExpertParallel(model, cluster, options=case.options)
    masters = []
    for parameter in ep.expert_parameters():
        parameter.main_param = torch.nn.Parameter(parameter.detach().float())
        masters.append(parameter.main_param)
    optimizer = torch.optim.AdamW(masters, lr=1e-3)
    for master in masters:
        master.grad = torch.ones_like(master)
    optimizer.step()  # moments that have to move
    optimizer.zero_grad()
    trace, groups, tokens = make_batch(case, 0)
    mine = np.arange(rank, trace.num_sequences, case.ranks)
    my_trace, my_groups = trace.select(mine), groups[mine]
    loads = ep.gather_loads(my_trace, my_groups, case.micro_batches)
    previous = ep.home.copy()
    routed = RoutedBatch(my_trace, my_groups, case.micro_batches)
    plan = kept_and_fetched(loads, cluster) if by_hand else ep.plan(routed, options=PlanOptions(balance=1.0))
    estimate, unplanned = ep.estimate(routed, plan), ep.estimate(routed)
    with counted_at_the_boundary(case.gpus_per_node) as wire, ep.batch(plan, my_trace, my_groups, optimizer):
        for m in range(case.micro_batches):
            ids, rows, counted = model_input(case, my_trace, tokens, mine, np.flatnonzero(my_groups == m))
            with ep.micro_batch(m, rows):
                loss_sum(model(ids), ids, counted).backward()
    return {
        "stats": ep.stats(),
        "sent": dict(ep.comm.ledger.batch_bytes()),
        "wire": dict(wire),
        "plan": plan,
        "previous": previous,
        "loads": loads,
        "estimate": estimate,
        "unplanned": unplanned,
    }


def kept_and_fetched(loads_LMRE: np.ndarray, cluster: ClusterSpec) -> BatchPlan:
    """Experts that move, a kept replica of any node in every first slot, fetched ones of the node in the others."""
    plan = shuffled_plan(loads_LMRE, cluster, 0)
    kept = plan.kept.copy()
    kept[:, :, 1:] = False
    owner = np.take_along_axis(plan.home[:, None, None], plan.replicas.clip(min=0), 3)
    node = np.arange(cluster.num_ranks)[:, None] // cluster.gpus_per_node
    stays = (plan.replicas >= 0) & (kept[:, None] | (owner // cluster.gpus_per_node == node))
    replicas, quota = np.where(stays, plan.replicas, -1), np.where(stays, plan.quota, 0)
    return replace(plan, replicas=replicas, quota=quota, kept=kept, loads_sha256="", model="", loads=loads_LMRE.sum(2))


@contextmanager
def counted_at_the_boundary(gpus_per_node: int) -> Iterator[Counter[str]]:
    """Bytes that all_to_all_single sends from this rank to others, "fast" and "slow", but for what ranks gather."""
    wire: Counter[str] = Counter()
    original, gather_tensors = dist.all_to_all_single, Comm.gather_tensors

    def gather(comm: Comm, local: torch.Tensor, phase: str) -> torch.Tensor:
        dist.all_to_all_single = original
        try:
            return gather_tensors(comm, local, phase)
        finally:
            dist.all_to_all_single = counting

    def counting(received: torch.Tensor, send: torch.Tensor, receive_counts: Any, send_counts: Any, **kwargs: Any):
        me = dist.get_rank()
        row = send[:1].numel() * send.element_size() if len(send) else 0
        group = kwargs.get("group") or dist.group.WORLD
        for rank, rows in zip(dist.get_process_group_ranks(group), send_counts, strict=True):
            if rank != me:
                wire["fast" if rank // gpus_per_node == me // gpus_per_node else "slow"] += rows * row
        return original(received, send, receive_counts, send_counts, **kwargs)

    dist.all_to_all_single, Comm.gather_tensors = counting, gather
    try:
        yield wire
    finally:
        dist.all_to_all_single, Comm.gather_tensors = original, gather_tensors
