"""Megatron-core's MoE layer under a plan: a spec that puts our experts and dispatch in its place.

Megatron's router, its losses and its shared experts stay. A rank makes its share of the experts only, contiguous; after
`expert_parallel(model, ...)` they are where the plan of a batch has them. Tested with megatron-core 0.16.1 and
0.19.2.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..parallel import ExpertParallel, RuntimeOptions
from ..planner import ClusterSpec
from ..planner.errors import InputError, ShapeError
from .megatron_layer import ReplicatedMoELayer

__all__ = ["with_relibra_experts", "expert_parallel", "layer_ids", "load_experts", "named_weights"]


# Where a spec has others in it: of a layer, a block, a hybrid model's stack, an MTP block.
_PARTS = ("submodules", "layer_specs", "mlp", "moe_layer", "mtp_model_layer")


def with_relibra_experts(spec: Any, *, groups: Any = None) -> Any:
    """A copy of the spec of a layer, a block, a hybrid stack or an MTP block, with our layer for every MoE layer in it.

    Args:
        spec: of 0.16 (`ModuleSpec(MoELayer, ...)`) or 0.19 (`partial(MoELayer, ...)`), for local modules or Transformer
            Engine's.
        groups: the `ProcessGroupCollection` that the model is made with, where it is: 0.16 hands it to its own layer
            only. None: what Megatron hands on, or `parallel_state`.

    Raises: InputError where it has no MoE layer.
    """
    replaced, count = _replaced(spec, {} if groups is None else {"pg_collection": groups})
    if not count:
        raise InputError(f"spec {type(spec).__name__} has no MoE layer of megatron-core")
    return replaced


def _replaced(spec: Any, known: dict[str, Any]) -> tuple[Any, int]:
    if isinstance(spec, ModuleSpec) and spec.module is MoELayer:
        return ModuleSpec(ReplicatedMoELayer, {**(spec.params or {}), **known}, spec.submodules, spec.metainfo), 1
    if isinstance(spec, functools.partial) and spec.func is MoELayer:  # 0.19, whose layers hand their groups on
        return functools.partial(ReplicatedMoELayer, *spec.args, **spec.keywords), 1
    if isinstance(spec, list | tuple):
        pairs = [_replaced(one, known) for one in spec]
        return type(spec)(one for one, _ in pairs), sum(count for _, count in pairs)
    inner = [name for name in _PARTS if hasattr(spec, name)]
    if not inner or isinstance(spec, type):
        return spec, 0
    spec, total = copy.copy(spec), 0
    for name in inner:
        one, count = _replaced(getattr(spec, name), known)
        setattr(spec, name, one)
        total += count
    return spec, total


def expert_parallel(
    model: nn.Module | Sequence[nn.Module],
    *,
    gpus_per_node: int,
    replica_slots: int = 2,
    groups: Any = None,
    model_name: str = "",
    options: RuntimeOptions | None = None,
) -> ExpertParallel:
    """`ExpertParallel` of a model whose spec came from `with_relibra_experts`, over Megatron's own groups. Collective.

    Give the model, or the list of its virtual pipeline chunks, before Megatron's DDP wraps it. Its layers are those of
    this pipeline stage: traces and plans have these layers only. Gradients are reduced by Megatron, not by
    `reduce_gradients`. Under context or sequence parallelism a rank's batch has its share of the tokens:
    `megatron_shares.TokenShare`. Tensor parallel ranks hold parts of the dense weights, which are not compared then.

    Args:
        groups: a `ProcessGroupCollection` with ep and expt_dp; None: those of `parallel_state`.
        model_name, options: as for `ExpertParallel`.
    """
    whole = model if isinstance(model, nn.Module) else nn.ModuleList(model)
    ep = parallel_state.get_expert_model_parallel_group() if groups is None else groups.ep
    kind = "cuda" if "nccl" in dist.get_backend(ep) else "cpu"
    copies = parallel_state.get_expert_data_parallel_group() if groups is None else groups.expt_dp
    mesh = _mesh_of(ep, copies, kind)
    size = dist.get_world_size(ep)
    if size % min(size, gpus_per_node):
        raise InputError(f"gpus_per_node is {gpus_per_node}; it must divide the expert-parallel group of {size}")
    cluster = ClusterSpec(max(1, size // gpus_per_node), min(size, gpus_per_node), replica_slots)
    layers = _layers(whole)
    options = options or RuntimeOptions()
    if any(layer.config.tensor_model_parallel_size > 1 for layer in layers):
        options = replace(options, compare_dense=False)
    runtime = ExpertParallel(whole, cluster, mesh, model_name=model_name, options=options)
    rank = dist.get_rank(ep)
    for index, layer in enumerate(layers):
        layer.placement = functools.partial(_experts_of, runtime, index, rank)
    return runtime


def load_experts(model: nn.Module | Sequence[nn.Module], weight_of: Callable[[str], Tensor]) -> None:
    """Fill the experts that this rank has, wherever a plan has put them, from weights by Megatron's names.

    mbridge loads parameters by name, one an expert, which our layer has not: it passes ours over with a warning. Call
    this after it, and before the optimizer is made, which copies the weights.

    Args:
        weight_of: gives gate and up [2 * I, H] of expert 17 for `decoder.layers.3.mlp.experts.linear_fc1.weight17`, and
            its down projection [H, I] for `linear_fc2`; layers and experts by their numbers in the whole model. A rank
            asks for its own ones only.

    Raises: ShapeError where a weight has another shape; those before it are loaded then.
    """
    for layer in _layers(model):
        stem = f"decoder.layers.{int(layer.layer_number) - 1}.mlp.experts"
        for slot, expert in enumerate(layer.placement()):
            for name, parameter in (
                ("linear_fc1", layer.experts.gate_up_proj),
                ("linear_fc2", layer.experts.down_proj),
            ):
                whole, shape = f"{stem}.{name}.weight{expert}", tuple(parameter[slot].shape)
                weight = weight_of(whole)
                if weight.shape != shape:
                    raise ShapeError(f"{whole} is {tuple(weight.shape)}; it must be {shape}")
                with torch.no_grad():
                    parameter[slot].copy_(weight)


def layer_ids(model: nn.Module | Sequence[nn.Module]) -> tuple[int, ...]:
    """Numbers from 0 of the decoder layers of this pipeline stage that have our experts, in the order of its plans.

    What `trace.slice_layers` takes, so that a stage's trace has its layers only. Of virtual stages give the list of
    chunks, as to `expert_parallel`.
    """
    return tuple(int(layer.layer_number) - 1 for layer in _layers(model))


def named_weights(ep: ExpertParallel) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of this pipeline stage under the name that Megatron's grouped experts have. Collective.

    `mlp.experts.linear_fc1.weight17` is gate and up [2 * I, H] of the logical expert 17, `linear_fc2.weight17` its down
    projection [H, I], whatever rank has them: the names, with global numbers of experts, that mbridge and verl map to
    Hugging Face's. All other parameters are this rank's own, under their names in the model (that of each virtual chunk
    after its number). One layer's experts are gathered at a time.
    """
    for name, tensor in ep.named_logical_parameters():
        assert tensor is not None  # every parameter has a value
        stem, _, own = name.rpartition(".")
        theirs = {"gate_up_proj": "linear_fc1", "down_proj": "linear_fc2"}.get(own)
        if theirs is None or not stem.endswith("mlp.experts"):
            yield name, tensor
            continue
        for expert, weight in enumerate(tensor):
            yield f"{stem}.{theirs}.weight{expert}", weight


def _layers(model: nn.Module | Sequence[nn.Module]) -> list[ReplicatedMoELayer]:
    chunks = [model] if isinstance(model, nn.Module) else model
    return [layer for chunk in chunks for layer in chunk.modules() if isinstance(layer, ReplicatedMoELayer)]


def _mesh_of(ep: Any, copies: Any, kind: str) -> DeviceMesh:
    """The mesh [copies, ranks of one copy] of the ranks that have this stage's experts."""
    if dist.get_world_size(copies) == 1:
        return DeviceMesh.from_group(ep, kind, mesh_dim_names=("ep",))
    rows: list[Any] = [None] * dist.get_world_size(copies)
    dist.all_gather_object(rows, dist.get_process_group_ranks(ep), group=copies)
    return DeviceMesh.from_group([copies, ep], kind, mesh=torch.tensor(rows), mesh_dim_names=("copies", "ep"))


def _experts_of(runtime: ExpertParallel, layer: int, rank: int) -> list[int]:
    return [int(expert) for expert in np.flatnonzero(runtime.home[layer] == rank)]
