"""`DistributedConfig(ep_implementation="relibra")`: an adapter from transformers' expert parallelism to the runtime.

transformers shards the experts by contiguous id and gives every layer its rows and weights; how rows and replicas
travel is the runtime's. Experts stay where transformers puts them. Without a batch, routing is live.
"""

from typing import Any
from weakref import WeakKeyDictionary

import transformers
from torch import Tensor, nn

from ...nn import adapted
from ...parallel.attachment import Runner
from ...parallel.comm.collectives import Comm
from ...parallel.comm.groups import Groups
from ...parallel.live import LiveRouting
from ...parallel.running import ModelRunner
from ...parallel.session import RuntimeOptions
from ...parallel.tokens.layer import Experts
from ...parallel.tokens.one_hop import OneHop
from ...planner import ClusterSpec
from ...planner.errors import InputError
from ...planner.plan import contiguous_home
from ...weights import ExpertWeights
from .experts import cast_for_experts, expert_form, refuse_norm

try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
except ModuleNotFoundError:  # before 5.23: no hook for expert parallelism, all else works
    EPImplementation, EPImplementationInterface = object, None


class RelibraEP(EPImplementation):
    """The experts of one layer, reached by our dispatch; one instance a layer, as transformers makes them."""

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any):
        if tp_mesh.size() > 1:
            raise InputError(
                f"tp_size is {tp_mesh.size()}; ep_implementation 'relibra' needs ranks that hold different tokens: set "
                "tp_size=1 and fsdp_size to the number of ranks"
            )
        refuse_norm(experts)
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts, self.form = experts, expert_form(experts)
        self.groups = _groups_of(ep_mesh)
        self.num_experts = self.num_local_experts * self.groups.experts.size
        home = contiguous_home(1, self.num_experts, self.groups.experts.size)
        self.alone: Runner = LiveRouting(OneHop(self.groups.experts, self.groups.host), home, RuntimeOptions())
        self.runner: ModelRunner | None = None  # of the model that this layer is in, once it has one
        self.layer = 0  # among that model's
        self.weights: ExpertWeights | None = None  # as FSDP last gathered them
        _IMPLEMENTATIONS[experts] = self

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x_TH, weights = cast_for_experts(hidden_states, adapted(self.experts, self.form))
        self.weights = weights
        experts = Experts(self.form, False, weights)
        where = (self.alone, 0) if self.runner is None else (self.runner, self.layer)
        out = where[0].run(where[1], experts, x_TH, top_k_index, top_k_weights.contiguous())
        return out.to(hidden_states.dtype)


if EPImplementationInterface is not None:
    EPImplementationInterface.register("relibra", RelibraEP)

_GROUPS: dict[Any, Groups] = {}  # one a process group, so that all layers count their bytes together
_IMPLEMENTATIONS: "WeakKeyDictionary[nn.Module, RelibraEP]" = WeakKeyDictionary()


def implementations_of(model: nn.Module) -> list[RelibraEP]:
    """The `RelibraEP` of every MoE layer of a model, in order."""
    if EPImplementationInterface is None:
        raise InputError(
            f"transformers is {transformers.__version__}, which has no hook for expert-parallel implementations; "
            "ep_implementation 'relibra' needs 5.23 or newer. replace_moe_blocks(model) with ExpertParallel works here"
        )
    found = [_IMPLEMENTATIONS[module] for module in model.modules() if module in _IMPLEMENTATIONS]
    if not found:
        raise InputError(
            f"model {type(model).__name__} has no experts under ep_implementation 'relibra': load it with "
            "from_pretrained(..., distributed_config=DistributedConfig(ep_size=..., ep_implementation='relibra'))"
        )
    return found


def runner_of_open_batch() -> ModelRunner | None:
    """The runner of the model whose batch opened last."""
    found = [one.runner for one in _IMPLEMENTATIONS.values() if one.runner is not None and one.runner.batch is not None]
    return max(found, key=lambda runner: runner.batch.serial, default=None)  # type: ignore[union-attr]


def communication(model: nn.Module) -> Comm:
    """The expert-parallel group of a model, which counts the bytes that travel, by kind."""
    return implementations_of(model)[0].groups.experts


def _groups_of(ep_mesh: Any) -> Groups:
    group = ep_mesh.get_group()
    if group not in _GROUPS:
        _GROUPS[group] = Groups(ep_mesh, ClusterSpec(1, ep_mesh.size(), 0))
    return _GROUPS[group]
