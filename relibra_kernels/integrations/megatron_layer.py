"""Megatron-core's MoE layer with our experts and dispatch: its router, its losses and its shared experts stay."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from ..nn import ReplicatedExperts
from ..planner.errors import InputError
from .megatron_choice import RecordedChoice, expert_form
from .taken_layer import TakenLayer

# Formats of the distributed optimizer's state that know ranks and no parameters.
_BY_RANK = ("dp_reshardable", "dp_zero_gather_scatter", "fully_sharded_bucket_space")


class ReplicatedMoELayer(MoELayer):
    """Megatron's router and shared experts around our experts.

    A `MoELayer`, since Megatron asks whether a layer has one before it recomputes or unpacks what is around it. Before
    `expert_parallel` it runs with an expert-parallel group of one rank only.
    """

    def __init__(
        self, config: Any, submodules: Any = None, layer_number: Any = None, pg_collection: Any = None, **more: Any
    ):
        groups = get_default_pg_collection() if pg_collection is None else pg_collection
        name = more.pop("name", None)
        BaseMoELayer.__init__(self, config=config, layer_number=layer_number, pg_collection=groups, **more)
        form = expert_form(config)
        self.router = submodules.router(config=config, pg_collection=groups, **more)
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        sizes = (self.num_local_experts, config.hidden_size, config.moe_ffn_hidden_size)
        experts = ReplicatedExperts(*sizes, form=form, dtype=config.params_dtype, device="meta")  # draws no numbers
        self.experts = experts.to_empty(device=device)
        self.experts.all_experts = config.num_moe_experts
        self._initialise()
        parallel = self.ep_group.size() > 1
        for parameter in self.experts.parameters():
            parameter.allreduce = not parallel  # type: ignore[attr-defined]  # Megatron's DDP goes by it
        self.choice = RecordedChoice(self.router, config.moe_router_topk)
        self.router.router_replay = self.choice
        self.experts.layer = TakenLayer(self.experts, self.choice)
        if self.use_shared_expert:
            known = {"name": f"{name}.shared_experts"} if name is not None else {}
            shared = submodules.shared_experts  # a spec; of 0.19, what makes them
            make = functools.partial(build_module, shared) if isinstance(shared, ModuleSpec | type) else shared
            self.shared_experts = make(
                config=config,
                pg_collection=groups,
                gate=getattr(config, "moe_shared_expert_gate", False),
                **known,
            )
        self._expt_dp = groups.expt_dp
        self._recompute = config.recompute_granularity == "selective" and "moe" in (config.recompute_modules or ())
        self.placement: Callable[[], Sequence[int]] = lambda: self.local_expert_indices

    def _initialise(self) -> None:
        """Every expert from a seed of its own, so that experts do not depend on the number of ranks."""
        config, home = self.config, self.experts.gate_up_proj.device
        if not config.perform_initialization:
            return
        base = int(torch.randint(1 << 40, ()))  # Megatron seeds the ranks of an expert-parallel group alike
        with torch.random.fork_rng(devices=[home] if home.type == "cuda" else []), torch.no_grad():
            for slot, expert in enumerate(self.local_expert_indices):
                torch.manual_seed(base + expert)
                config.init_method(self.experts.gate_up_proj[slot])
                config.output_layer_init_method(self.experts.down_proj[slot])

    def forward(self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Any = None) -> Any:
        """hidden_states [S, B, H] -> ([S, B, H], None)."""
        if intermediate_tensors is not None:
            raise InputError("intermediate_tensors are of partial CUDA graphs, which are not supported")
        mask = None if padding_mask is None else padding_mask.transpose(0, 1).bool()
        if self._recompute and self.training:
            return checkpoint(self._run, False, hidden_states, mask), None
        return self._run(hidden_states, mask), None

    def _run(self, hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
        self.choice.begin()
        probs_TE, map_TE = self.router(hidden_states, padding_mask)
        index_TK = self._chosen(probs_TE, map_TE)
        weights_TK = probs_TE.gather(1, index_TK.clamp(min=0)).masked_fill(index_TK < 0, 0.0)
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = self.experts(x_TH, index_TK, weights_TK).view_as(hidden_states)
        return out if self.shared_experts is None else out + self.shared_experts(hidden_states)

    def _chosen(self, probs_TE: Tensor, map_TE: Tensor) -> Tensor:
        """int64 [T, K] of a routing map; in the order of the recorded ids where those were chosen."""
        top_k = self.choice.top_k
        scores, index_TK = probs_TE.detach().masked_fill(~map_TE, -1.0).topk(top_k, dim=1)
        index_TK = index_TK.masked_fill(scores < 0, -1)
        recorded = self.choice.recorded
        if recorded is None:
            return index_TK
        same = map_TE.gather(1, recorded.clamp(min=0)).all(1, keepdim=True) & (recorded >= 0)
        return torch.where(same, recorded, index_TK)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """As Megatron's own layer: a tensor an expert, by its logical number, so that no placement shows."""
        kind = (metadata or {}).get("distrib_optim_sharding_type", "")
        if kind in _BY_RANK and list(self.placement()) != list(self.local_expert_indices):
            raise InputError(
                f"distrib_optim_sharding_type is {kind!r}, which saves the optimizer's state by rank, but experts have "
                "moved: use 'fully_reshardable', or call ep.move_home(optimizer) before"
            )
        experts = self.experts
        self.experts = None  # type: ignore[assignment]  # so that the others are asked as Megatron asks them
        try:
            state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        finally:
            self.experts = experts
        for attribute, name in (("gate_up_proj", "linear_fc1"), ("down_proj", "linear_fc2")):
            state[f"{prefix}experts.{attribute}"] = self._sharded(
                f"{prefix}experts.experts.{name}.weight", getattr(experts, attribute), sharded_offsets
            )
        return state

    def _sharded(self, key: str, parameter: Tensor, offsets: tuple) -> ShardedTensorFactory:
        axes, total = len(offsets) + 1, self.config.num_moe_experts
        halves = 2 if key.endswith("linear_fc1.weight") else 1  # gate and up, as Megatron splits them
        numbers = list(self.placement())

        def build(key: str, tensor: Tensor, replica_id: Any, _range: Any) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    part,
                    *offsets,
                    (len(offsets), number, total),
                    (axes, half, halves),
                    replica_id=replica_id,
                    prepend_axis_num=axes,
                )
                for number, rows in zip(numbers, tensor, strict=True)
                for half, part in enumerate(rows.chunk(halves))
            ]

        def merge(parts: list[Tensor]) -> Tensor:
            return torch.stack([torch.cat(parts[i : i + halves]) for i in range(0, len(parts), halves)])

        replica_id = (0, 0, dist.get_rank(self._expt_dp))
        return ShardedTensorFactory(key, parameter, build, merge, replica_id)
