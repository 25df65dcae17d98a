"""Adapters of experts, trained by ranks under plans: what a rank does, and one process beside it.

`how`: "peft" before `ExpertParallel`, "peft after" it, or "own": `ReplicatedExperts.adapt`.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from hf_under_plan import MICRO_BATCHES, SEQUENCES, STEPS, loss_of, make_tokens, moving_plan, prepared
from torch import Tensor, nn

from relibra_kernels import BatchPlan, ClusterSpec, ExpertParallel, RoutedBatch, RoutingTrace

RANK = 3


def wrapped(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = [
        name.split(".")[-3:] for name, p in model.named_parameters() if p.ndim == 3 and name.split(".")[-2] == "experts"
    ]
    experts = sorted({".".join(name) for name in names})
    config = LoraConfig(r=RANK, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False)
    torch.manual_seed(1)
    return get_peft_model(model, config)


def adapted_by(how: str, family: str) -> nn.Module:
    """The model with all experts and adapters of all of them."""
    if how != "own":
        return wrapped(prepared(family))
    from relibra_kernels.integrations.transformers import replace_moe_blocks

    model = prepared(family).requires_grad_(False)
    torch.manual_seed(1)
    for layer in replace_moe_blocks(model):
        layer.experts.adapt(RANK)
        for name, parameter in layer.experts.named_parameters():
            if name.endswith(("_left", "_right")):
                nn.init.normal_(parameter, std=0.2)
    return model


def spread(how: str, family: str, ranks: int, reduction: str = "sum") -> tuple[nn.Module, ExpertParallel]:
    """The same on ranks."""
    cluster = ClusterSpec(1, ranks, replica_slots=1)
    if how != "peft after":
        model = adapted_by(how, family)
        return model, ExpertParallel(model, cluster, reduction=reduction)
    model = prepared(family)
    ep = ExpertParallel(model, cluster, reduction=reduction)
    model, whole = wrapped(model), wrapped(prepared(family))
    assert len(ep.expert_parameters()) > sum(len(list(moe.experts.parameters())) for moe in ep.layers)
    factors = {id(f.linear.weight): (f, layer) for layer, moe in enumerate(ep.layers) for f in moe.experts.adapters}
    with torch.no_grad():
        for (name, own), (also, full) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
            assert name == also
            if id(own) in factors:
                factor, layer = factors[id(own)]
                mine = np.flatnonzero(ep.home[layer] == dist.get_rank())
                all_of_them = dataclasses.replace(factor, wrapper=SimpleNamespace(num_experts=ep.num_experts))
                own.copy_(factor.whole(all_of_them.by_expert(full)[mine]))
            elif "lora" in name:
                own.copy_(full)
    return model, ep


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def kept_plan(plan: BatchPlan) -> BatchPlan:
    """The same, but every replica stays for all micro-batches, and computes one assignment in each."""
    replicas = np.repeat(plan.replicas[:, :1], plan.num_micro_batches, 1)
    return dataclasses.replace(plan, replicas=replicas, quota=replicas * 0 + 1, kept=np.ones_like(plan.kept))


def alone(how: str, family: str, traces: list[RoutingTrace]) -> list[dict[str, Tensor]]:
    """Gradients of every step."""
    from relibra_kernels.integrations.transformers import replay

    model = adapted_by(how, family)
    optimizer = torch.optim.SGD(trained(model), lr=0.1, momentum=0.9)
    results = []
    for step, trace in enumerate(traces):
        optimizer.zero_grad()
        with replay(model, trace, on_shift="ignore"):
            loss_of(model, make_tokens(step)).backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return results


def step_under_plan(
    model: nn.Module,
    ep: ExpertParallel,
    optimizer: torch.optim.Optimizer,
    step: int,
    whole: RoutingTrace,
    keep: bool = False,
) -> tuple[RoutedBatch, BatchPlan]:
    """Forwards and backwards of this rank under a plan that moves experts, and with `keep` keeps its replicas."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = np.arange(SEQUENCES)[rank::ranks]
    groups = np.arange(len(mine)) * MICRO_BATCHES // len(mine)
    batch, tokens = RoutedBatch(whole.select(mine), groups, MICRO_BATCHES), make_tokens(step)[mine]
    optimizer.zero_grad()
    plan = moving_plan(ep.gather_loads(batch), step + 1)
    with ep.batch(kept_plan(plan) if keep else plan, batch, optimizer):
        for m in range(MICRO_BATCHES):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(m == MICRO_BATCHES - 1)
            with ep.micro_batch(m):
                loss_of(model, tokens[groups == m]).backward()
    return batch, plan


def sharded(how: str, family: str, traces: list[RoutingTrace]) -> tuple[list[dict[str, Tensor]], int]:
    """Gradients of every step where FSDP2 shards all but the experts; how many trained parameters are sharded.

    FSDP2 gives the mean over the ranks, so that the learning rate is the ranks' times as high.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, ep = spread(how, family, ranks, "mean")
    experts = set(ep.expert_parameters())
    for block in [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]:
        fully_shard(block, ignored_params=experts)
    fully_shard(model, ignored_params=experts)
    optimizer = torch.optim.SGD(trained(model), lr=0.1 * ranks, momentum=0.9)
    results = []
    for step, whole in enumerate(traces):
        step_under_plan(model, ep, optimizer, step, whole)
        ep.reduce_gradients()
        gradients = {name: g * ranks for name, g in ep.named_logical_parameters(lambda p: p.grad) if g is not None}
        results.append(gradients if rank == 0 else {})
        optimizer.step()
    return results, sum(isinstance(parameter, DTensor) for parameter in trained(model))


def together(how: str, family: str, traces: list[RoutingTrace], keep: bool, folder: str) -> list[dict[str, Tensor]]:
    """The same on ranks; then a checkpoint is written and read into a new model, whose adapters must be the same."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, ep = spread(how, family, ranks)
    optimizer = torch.optim.SGD(trained(model), lr=0.1, momentum=0.9)
    results = []
    for step, whole in enumerate(traces):
        batch, plan = step_under_plan(model, ep, optimizer, step, whole, keep)
        sent = ep.comm.ledger.batch_bytes()["kept_gradients" if keep else "replica_gradients", "fast"]
        assert 0 < sent <= ep.stats().replicas * factor_bytes(ep)  # of this rank's; not those of whole weights
        ep.reduce_gradients()
        gradients = {name: g.clone() for name, g in ep.named_logical_parameters(lambda p: p.grad) if g is not None}
        results.append(gradients if rank == 0 else {})
        optimizer.step()
    found = ep.estimate(batch, plan)
    assert found.gradient_bytes == len(ep.layers) * ep.num_experts // ranks * factor_bytes(ep)  # priced so
    ep.save_checkpoint(folder, optimizer)
    again, fresh = spread(how, family, ranks)
    with torch.no_grad():
        for parameter in trained(again):
            parameter.zero_()
    fresh.load_checkpoint(folder, torch.optim.SGD(trained(again), lr=0.1, momentum=0.9))
    expected = dict(ep.named_logical_parameters())
    for name, tensor in fresh.named_logical_parameters():
        assert torch.equal(tensor, expected[name]), name
    assert (ep.home != fresh.home).any()
    return results


def factor_bytes(ep: ExpertParallel) -> int:
    """fp32 factors of one expert, which are less than its weights."""
    experts = ep.layers[0].experts
    hidden, inner, width = experts.hidden_size, experts.intermediate_size, experts.form.width(experts.intermediate_size)
    elements = RANK * (hidden + width) + RANK * (inner + hidden)
    assert elements < hidden * (width + inner)
    return 4 * elements


def traces_of(family: str) -> list[RoutingTrace]:
    from hf_under_plan import random_trace

    from relibra_kernels.integrations.transformers.moe_layers import moe_layers

    layers = moe_layers(prepared(family))
    numbers = tuple(layer.layer_id for layer in layers)
    return [random_trace(len(layers), numbers, layers[0].num_experts, layers[0].top_k, step) for step in range(STEPS)]
