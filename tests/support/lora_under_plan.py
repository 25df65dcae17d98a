"""PEFT adapters of experts, trained by ranks under plans: what a rank does, and one process beside it."""

import dataclasses

import numpy as np
import torch
import torch.distributed as dist
from hf_under_plan import LENGTH, MICRO_BATCHES, SEQUENCES, STEPS, loss_of, make_tokens, moving_plan, prepared
from torch import Tensor, nn

from relibra_kernels import BatchPlan, ClusterSpec, ExpertParallel, RoutingTrace


def wrapped(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False)
    torch.manual_seed(1)
    return get_peft_model(model, config)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def kept_plan(plan: BatchPlan) -> BatchPlan:
    """The same, but every replica stays for all micro-batches, and computes one assignment in each."""
    replicas = np.repeat(plan.replicas[:, :1], plan.num_micro_batches, 1)
    return dataclasses.replace(plan, replicas=replicas, quota=replicas * 0 + 1, kept=np.ones_like(plan.kept))


def alone(family: str, traces: list[RoutingTrace]) -> list[dict[str, Tensor]]:
    """Gradients of every step."""
    from relibra_kernels.integrations.transformers import replay

    model = wrapped(prepared(family))
    optimizer = torch.optim.SGD(trained(model), lr=0.1, momentum=0.9)
    results = []
    for step, trace in enumerate(traces):
        optimizer.zero_grad()
        with replay(model, trace, on_shift="ignore"):
            loss_of(model, make_tokens(step)).backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return results


def together(family: str, traces: list[RoutingTrace], keep: bool, folder: str) -> list[dict[str, Tensor]]:
    """The same on ranks; then a checkpoint is written and read into a new model, whose adapters must be the same."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = wrapped(prepared(family))
    ep = ExpertParallel(model, ClusterSpec(1, ranks, replica_slots=1))
    optimizer = torch.optim.SGD(trained(model), lr=0.1, momentum=0.9)
    mine = np.arange(SEQUENCES)[rank::ranks]
    groups = np.arange(len(mine)) * MICRO_BATCHES // len(mine)
    results = []
    for step, whole in enumerate(traces):
        optimizer.zero_grad()
        trace, tokens = whole.select(mine), make_tokens(step)[mine]
        plan = moving_plan(ep.gather_loads(trace, groups, MICRO_BATCHES), step + 1)
        with ep.batch(kept_plan(plan) if keep else plan, trace, groups, optimizer):
            for m in range(MICRO_BATCHES):
                with ep.micro_batch(m):
                    loss_of(model, tokens[groups == m]).backward()
        ep.reduce_gradients()
        gradients = {name: g.clone() for name, g in ep.named_logical_parameters(lambda p: p.grad) if g is not None}
        results.append(gradients if rank == 0 else {})
        optimizer.step()
    ep.save_checkpoint(folder, optimizer)
    again = wrapped(prepared(family))
    fresh = ExpertParallel(again, ClusterSpec(1, ranks, replica_slots=1))
    fresh.load_checkpoint(folder, torch.optim.SGD(trained(again), lr=0.1, momentum=0.9))
    expected = dict(ep.named_logical_parameters())
    for name, tensor in fresh.named_logical_parameters():
        assert torch.equal(tensor, expected[name]), name
    assert (ep.home != fresh.home).any()
    return results


def traces_of(layers: int, experts: int, top_k: int) -> list[RoutingTrace]:
    from hf_under_plan import random_trace

    assert LENGTH > 1
    return [random_trace(layers, tuple(range(layers)), experts, top_k, step) for step in range(STEPS)]
