"""What must hold before a batch begins, on every rank: checked before anything moves."""

from collections.abc import Sequence

import torch

from ..nn import ReplicatedMoE
from ..planner import BatchPlan, ClusterSpec, RoutingTrace
from ..planner.errors import InputError, PlanError
from .experts.parameters import expert_parameters


def check_trace(
    trace: RoutingTrace, num_layers: int, top_k: int, num_experts: int, layer_ids: Sequence[int] | None = None
) -> None:
    """A trace of the routing of a model with these MoE layers.

    Args:
        layer_ids: the numbers of the decoder layers that have experts, where they are known. A trace that numbers its
            layers from 0 is taken to mean the same.
    """
    shape = (trace.num_layers, trace.top_k, trace.num_experts)
    expected = (num_layers, top_k, num_experts)
    if shape != expected:
        raise InputError(f"trace has (layers, top-k, experts) {shape}; the model has {expected}")
    if layer_ids is not None and trace.moe_layer_ids not in (tuple(layer_ids), tuple(range(num_layers))):
        raise InputError(
            f"trace was recorded in the layers {trace.moe_layer_ids}; the model has experts in {tuple(layer_ids)}"
        )


def check_plan(
    plan: BatchPlan, layers: Sequence[ReplicatedMoE], num_experts: int, cluster: ClusterSpec, model_name: str
) -> None:
    """A plan for this model on this cluster."""
    if plan.model and model_name and plan.model != model_name:
        raise PlanError(f"plan is for model {plan.model!r}; this is {model_name!r}")
    shape = (plan.num_layers, plan.num_experts, plan.num_ranks, plan.gpus_per_node)
    expected = (len(layers), num_experts, cluster.num_ranks, cluster.gpus_per_node)
    if shape != expected:
        raise PlanError(f"plan is for (layers, experts, ranks, GPUs a node) {shape}; this run has {expected}")


def check_optimizer(optimizer: torch.optim.Optimizer | None, layers: Sequence[ReplicatedMoE]) -> None:
    """Every expert parameter that is trained is in the optimizer, itself or as its fp32 master `main_param`."""
    if optimizer is None:
        return
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer, moe in enumerate(layers):
        for name, parameter in expert_parameters(moe.experts):
            known = id(parameter) in trained or id(getattr(parameter, "main_param", None)) in trained
            if parameter.requires_grad and not known:
                raise InputError(
                    f"optimizer does not have {name} of MoE layer {layer}: it must be made after ExpertParallel, "
                    "which replaces the experts' parameters"
                )
