"""Training with several expert-parallel groups, FSDP2 and DDP, run on every rank of the default group."""

import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy_plans import shuffled_plan
from toy_training import Case, ToyModel, loss_sum, make_batch, make_optimizer, model_input

from relibra_kernels.parallel import ExpertParallel
from relibra_kernels.planner import ClusterSpec, PlanOptions


def train_composed(case: Case, groups: int, dense: str, max_norm: float) -> dict[str, object]:
    """Losses, gradient norms and final parameters; experts moved; replicas of the plans that were not made by hand.

    Args:
        groups: expert-parallel groups. dense: "ours" | "fsdp" | "ddp", who reduces the other gradients.
        max_norm: what the gradients are clipped to.
    """
    size = case.ranks // groups
    rank, world = dist.get_rank(), case.ranks
    shape, names = ((groups, size), ("copies", "ep")) if groups > 1 else ((size,), ("ep",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = ToyModel(case)
    nodes = 2 if case.options.transport == "two" else 1
    cluster = ClusterSpec(nodes, size // nodes, case.replica_slots)
    reduction = "sum" if dense == "ours" else "mean"
    ep = ExpertParallel(model, cluster, mesh, model_name="toy", reduction=reduction, options=case.options)
    called: torch.nn.Module = model
    if dense == "fsdp":
        experts = set(ep.expert_parameters())
        for block in model.moe:
            fully_shard(block, ignored_params=experts)
        fully_shard(model, ignored_params=experts)
    if dense == "ddp":
        own = {id(p) for p in ep.expert_parameters()}
        names_of_experts = [name for name, p in model.named_parameters() if id(p) in own]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names_of_experts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            called = DistributedDataParallel(model)
    optimizer = make_optimizer(case, model)
    losses, norms, moved, replicas = [], [], 0, 0
    for step in range(case.steps):
        trace, micro_batches, tokens = make_batch(case, step)
        mine = np.arange(rank, trace.num_sequences, world)
        my_trace, my_groups = trace.select(mine), micro_batches[mine]
        plan = ep.plan(my_trace, my_groups, case.micro_batches, options=PlanOptions(balance=1.0))
        if step == 0:  # homes that move whether or not that pays, the same ones in every group
            plan = shuffled_plan(ep.gather_loads(my_trace, my_groups, case.micro_batches), cluster, step)
        else:
            replicas += int((plan.replicas >= 0).sum())
        moved += int((plan.home != ep.home).sum())
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        with ep.batch(plan, my_trace, my_groups, optimizer):
            for m in range(case.micro_batches):
                last = m == case.micro_batches - 1  # gradients accumulate until then
                if dense == "fsdp":
                    model.set_requires_gradient_sync(last)
                if dense == "ddp":
                    called.require_backward_grad_sync = last
                ids, rows, counted = model_input(case, my_trace, tokens, mine, np.flatnonzero(my_groups == m))
                with ep.micro_batch(m, rows):
                    loss = loss_sum(called(ids), ids, counted) / trace.num_tokens
                    (loss * (1 if dense == "ours" else world)).backward()
                total += loss.detach().double()
        ep.reduce_gradients(dense=dense != "ddp")
        norms.append(float(ep.clip_grad_norm_(max_norm)))
        optimizer.step()
        dist.all_reduce(total)
        losses.append(float(total))
    parameters = {name: value.double().numpy().copy() for name, value in ep.named_logical_parameters()}
    return {
        "losses": losses,
        "norms": norms,
        "parameters": parameters,
        "moved": moved,
        "replicas": replicas,
        "home": ep.home,
    }
