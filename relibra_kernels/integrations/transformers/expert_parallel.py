"""`DistributedConfig(ep_implementation="relibra")`: the experts of a model over ranks, a layer at a time.

transformers shards the experts by contiguous id and gives every layer its rows; what is ours is how rows and replicas
travel. Without a batch that is open, or in one without a trace, every layer exchanges its counts first, as the
all-to-all of transformers does. In a batch with a trace (`planned.py`), all sizes are known before the step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from ...parallel.comm.collectives import Comm
from ...parallel.experts.kept import KeptReplicas
from ...parallel.experts.replicas import ReplicaPushes
from ...parallel.microbatch import BatchParts, MicroBatch
from ...parallel.session import RuntimeOptions, Session
from ...parallel.tokens.buffers import Buffers
from ...parallel.tokens.layer import ExpertParallelMLP, LayerSite
from ...parallel.tokens.tables import Tables
from ...planner import BatchPlan, RoutingTrace, count_loads
from ...planner.errors import InputError
from ...planner.plan import contiguous_home
from ...weights import ExpertWeights
from .experts import cast_for_experts, expert_form, expert_weights

try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
except ModuleNotFoundError:  # before 5.23: no hook for expert parallelism, all else works
    EPImplementation, EPImplementationInterface = object, None


@dataclasses.dataclass
class Batch:
    """A batch that is open, as its layers see it.

    `tables`, `parts`, `traces`: None where routing is live. `current`: the micro-batch where all sizes are known.
    `weights`: this rank's experts of every layer, as FSDP last gathered them.
    """

    model: nn.Module
    plan: BatchPlan
    comm: Comm
    device: torch.device
    traces: list[RoutingTrace] | None = None  # of each micro-batch, this rank's sequences
    tables: Tables | None = None
    parts: BatchParts | None = None
    weights: dict[int, ExpertWeights] = dataclasses.field(default_factory=dict)
    micro_batch: int | None = None
    current: MicroBatch | None = None


class RelibraEP(EPImplementation):
    """The experts of one layer, reached by our dispatch; one instance a layer, as transformers makes them."""

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any):
        super().__init__(experts, ep_mesh, tp_mesh)
        if tp_mesh.size() > 1:
            raise InputError(
                f"tp_size is {tp_mesh.size()}; ep_implementation 'relibra' needs ranks that hold different tokens: set "
                "tp_size=1 and fsdp_size to the number of ranks"
            )
        self.experts, self.form = experts, expert_form(experts)
        group = ep_mesh.get_group()
        self.comm = _COMMS.setdefault(group, Comm(group, ep_mesh.size()))
        self.num_experts = self.num_local_experts * self.comm.size
        self.batch: Batch | None = None
        self.layer = 0  # among the layers of the batch that is open
        _IMPLEMENTATIONS[experts] = self

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x_TH, weights = cast_for_experts(hidden_states, expert_weights(self.experts))
        site = self._site(top_k_index, weights)
        return ExpertParallelMLP.apply(x_TH, top_k_weights.contiguous(), site, self.form, False, *weights)

    def _site(self, top_k_index: Tensor, weights: ExpertWeights) -> LayerSite:
        batch = self.batch
        if batch is None:
            empty = np.zeros((self.comm.size, 0), np.int32)
            return _live_site(self.comm, top_k_index, self.num_experts, empty, empty, weights)
        if batch.micro_batch is None:
            raise InputError(f"MoE layer {self.layer} runs outside of a micro-batch: use `with micro_batch(m)`")
        if batch.tables is None:
            replicas, quota = (x[self.layer, batch.micro_batch] for x in (batch.plan.replicas, batch.plan.quota))
            return _live_site(self.comm, top_k_index, self.num_experts, replicas, quota, weights)
        if batch.current is None or batch.current.num_tokens != len(top_k_index):
            known = None if batch.current is None else batch.current.num_tokens
            raise InputError(
                f"MoE layer {self.layer} got {len(top_k_index)} tokens; micro-batch {batch.micro_batch} is for {known}"
            )
        batch.weights[self.layer] = weights
        return batch.current.sites(self.layer)[0]


if EPImplementationInterface is not None:
    EPImplementationInterface.register("relibra", RelibraEP)

_COMMS: dict[Any, Comm] = {}  # one a process group, so that all layers count their bytes together
_IMPLEMENTATIONS: "WeakKeyDictionary[nn.Module, RelibraEP]" = WeakKeyDictionary()


def implementations_of(model: nn.Module) -> list[RelibraEP]:
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


def communication(model: nn.Module) -> Comm:
    """The expert-parallel group of a model, which counts the bytes that travel, by kind."""
    return implementations_of(model)[0].comm


def collective_device(comm: Comm) -> torch.device:
    """Where this group's collectives want their tensors."""
    on_gpu = "nccl" in dist.get_backend(comm.group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def shared_parts(
    comm: Comm, plan: BatchPlan, weights_of: Callable[[int], ExpertWeights], device: torch.device
) -> BatchParts:
    """What layers share. FSDP gathers a layer's weights when it runs: nothing is fetched ahead, none is kept."""
    kept = KeptReplicas(comm, plan, weights_of, np.zeros_like(plan.kept))
    pushes = ReplicaPushes(comm, weights_of, kept.weights)
    session = Session(RuntimeOptions(), comm.ledger)
    return BatchParts(session, comm, plan, pushes, kept, Buffers(), device, fetch_ahead=False)


def _live_site(
    comm: Comm,
    top_k_index: Tensor,
    num_experts: int,
    replicas_RS: np.ndarray,
    quota_RS: np.ndarray,
    weights: ExpertWeights,
) -> LayerSite:
    """The site of one layer whose routing was not known before: counts and slots are exchanged now. Collective."""
    device = top_k_index.device
    ids_TLK = top_k_index.numpy(force=True)[:, None].astype(np.int16)
    trace = RoutingTrace(ids_TLK, np.array([0, len(ids_TLK)]), num_experts, (0,))
    groups = np.zeros(1, np.int64)
    loads_RE = comm.gather_arrays(count_loads(trace, groups, 1)[0, 0], device, "the exchange of live loads")
    kept = replicas_RS >= 0  # whatever is held is allowed: the plan was checked when the batch was opened
    live = BatchPlan(
        home=contiguous_home(1, num_experts, comm.size),
        replicas=replicas_RS[None, None],
        quota=_at_most(replicas_RS, quota_RS, loads_RE.sum(0))[None, None],
        kept=kept[None],
        gpus_per_node=comm.gpus_per_node,
    )
    tables = Tables(comm, live, loads_RE[None, None], trace, groups, device)
    try:
        known = tables.get(0)
    finally:
        tables.close()
    return MicroBatch(shared_parts(comm, live, lambda _: weights, device), known, 0, None).sites(0)[0]


def _at_most(replicas_RS: np.ndarray, quota_RS: np.ndarray, loads_E: np.ndarray) -> np.ndarray:
    """Quotas cut down to what the experts have, first come first served by rank and slot."""
    left, capped = loads_E.astype(np.int64), np.zeros_like(quota_RS)
    for rank, slot in np.argwhere(quota_RS > 0):
        expert = replicas_RS[rank, slot]
        capped[rank, slot] = min(quota_RS[rank, slot], left[expert])
        left[expert] -= capped[rank, slot]
    return capped
