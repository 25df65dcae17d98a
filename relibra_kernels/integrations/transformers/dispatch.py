"""Rows, gate weights and replicas of one MoE layer on their way between ranks, where the parameters are another's.

Simpler than the runtime of `ExpertParallel`: homes stay contiguous, nothing is fetched ahead, gradients return through
autograd. A token travels to a rank once; its partial sum comes back once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import ops
from ...autograd import NO_WEIGHTS, moe_mlp_backward, moe_mlp_forward
from ...form import ExpertForm
from ...parallel.comm import Comm
from ...planner import BatchPlan
from ...schedule import Schedule
from ...weights import ExpertWeights, gradient_buffers, returned_gradients
from ..places import places_of_assignments


@dataclass(frozen=True)
class Replicas:
    """Transfers of one rank's replicas in one (layer, micro-batch).

    home_slots:     int64 [n], home slots that are pushed, ordered by host rank, then slot
    push_counts, pull_counts: experts to and from each rank
    weight_of_slot: int32 [E/R + S], in the home store followed by the arrivals (ordered by owner, then slot)
    """

    home_slots: Tensor
    push_counts: list[int]
    pull_counts: list[int]
    weight_of_slot: Tensor


@dataclass(frozen=True)
class Site:
    """Everything one rank needs to run one (layer, micro-batch), forward and backward.

    send:  the layer's tokens sorted by destination rank, each once a rank. local: received rows sorted by slot.
    where: for errors.
    """

    comm: Comm
    num_tokens: int
    send: Schedule
    send_counts: list[int]
    receive_counts: list[int]
    local: Schedule
    replicas: Replicas | None
    where: str

    def dispatch(self, values_T: Tensor, kind: str) -> Tensor:
        """Tokens' values [T, ...] to the ranks that compute them: [received, ...]."""
        token_of_row = torch.div(self.send.assignment_of, self.send.top_k, rounding_mode="floor")
        rows = values_T.index_select(0, token_of_row)
        return self.comm.exchange(rows, self.send_counts, self.receive_counts, kind, f"{kind} of {self.where}")

    def combine(self, partial: Tensor, kind: str) -> Tensor:
        """Partial results [received, ...] back to their tokens, added up over the ranks: [T, ...]."""
        rows = self.comm.exchange(partial, self.receive_counts, self.send_counts, kind, f"{kind} of {self.where}")
        return ops.unpermute(rows, None, self.send)

    def fetch(self, home: ExpertWeights) -> ExpertWeights | None:
        """The replicas on this rank; None where no rank has one."""
        if self.replicas is None:
            return None
        moves, phase = self.replicas, f"replica weights of {self.where}"

        def push(weight: Tensor) -> Tensor:
            leaving = weight.detach().index_select(0, moves.home_slots)
            return self.comm.exchange(leaving, moves.push_counts, moves.pull_counts, "replica_weights", phase)

        return home.map(push)

    def give_back(self, replica_grad: ExpertWeights, home_grad: ExpertWeights) -> None:
        """Replicas' fp32 gradients into their owners' buffers, in the order of the host ranks."""
        assert self.replicas is not None
        moves, phase = self.replicas, f"replica gradients of {self.where}"
        for mine, owners in zip(replica_grad.tensors(), home_grad.tensors(), strict=True):
            shards = self.comm.exchange(mine, moves.pull_counts, moves.push_counts, "replica_gradients", phase)
            ops.replica_reduce(owners, shards, moves.home_slots)


class DispatchedMLP(torch.autograd.Function):
    """`(x [T, H], weights [T, K], this rank's experts) -> out [T, H]`, on every rank of the group at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, site: Site, form: ExpertForm, *parameters: Tensor) -> Tensor:
        home = ExpertWeights(*parameters)
        replica = site.fetch(home)
        x_rows = site.dispatch(x, "dispatch")
        weight_rows = site.dispatch(weights.to(torch.promote_types(weights.dtype, torch.float32)), "dispatch")
        out_rows, h = moe_mlp_forward(
            x_rows, weight_rows, site.local, home, form, replica=replica, weight_of_slot=_weight_of_slot(site)
        )
        ctx.site, ctx.form, ctx.weights_dtype = site, form, weights.dtype
        ctx.save_for_backward(x_rows, h, weight_rows, *parameters)
        return site.combine(out_rows, "combine")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        site: Site = ctx.site
        x_rows, h, weight_rows, *parameters = ctx.saved_tensors
        home = ExpertWeights(*parameters)
        replica = site.fetch(home)
        needed = ctx.needs_input_grad[4:]
        grad = gradient_buffers(home, NO_WEIGHTS, needed)
        replica_grad = gradient_buffers(replica, NO_WEIGHTS, needed) if replica else None
        dx_rows, dweight_rows = moe_mlp_backward(
            site.dispatch(dout.contiguous(), "backward dispatch"),
            x_rows,
            h,
            weight_rows,
            site.local,
            home,
            ctx.form,
            grad=grad,
            replica=replica,
            replica_grad=replica_grad,
            weight_of_slot=_weight_of_slot(site),
        )
        dx, dweights = site.combine(dx_rows, "backward combine"), site.combine(dweight_rows, "backward combine")
        if replica_grad is not None:
            site.give_back(replica_grad, grad)
        returned = returned_gradients(home, grad, NO_WEIGHTS, needed)
        return dx, dweights.to(ctx.weights_dtype), None, None, *returned


def make_sites(
    comm: Comm,
    plan: BatchPlan,
    loads_LMRE: np.ndarray,
    ids_TLK: np.ndarray,
    micro_batch: int,
    device: torch.device,
    layers: Sequence[int] | None = None,
) -> list[Site]:
    """The sites of a micro-batch, a layer each. Collective: row counts and slots are exchanged.

    Args:
        ids_TLK: the routing of the tokens that this rank's model is fed, -1 for padding and what has no route.
        layers: what to call them in errors; None: 0 to L - 1.
    """
    routes = [
        _route(plan, loads_LMRE, ids_TLK[:, layer], layer, micro_batch, comm.rank) for layer in range(len(loads_LMRE))
    ]
    counts_RL = np.stack([counts for _, _, counts in routes], 1)
    one_each = [1] * comm.size
    send = torch.from_numpy(np.ascontiguousarray(counts_RL)).to(device)
    received_RL = comm.exchange(send, one_each, one_each, "counts", "the exchange of row counts").numpy(force=True)
    sites = []
    for layer, (assignment_of, slots_nK, counts) in enumerate(routes):
        where = f"layer {layer if layers is None else layers[layer]}, micro-batch {micro_batch}"
        receive = received_RL[:, layer].tolist()
        as_bytes = torch.from_numpy(slots_nK.view(np.uint8)).to(device)
        arrived = comm.exchange(as_bytes, counts.tolist(), receive, "slots", f"the exchange of slots of {where}")
        received_slots = arrived.numpy(force=True).view(np.int16)
        replicas = _replicas(plan, layer, micro_batch, comm.rank, device)
        num_slots = plan.experts_per_rank + (plan.num_slots if replicas else 0)
        known = int(np.count_nonzero(received_slots >= 0))
        local = ops.backend(device).build_schedule(
            torch.from_numpy(received_slots).to(device), num_slots, num_rows=known
        )
        send_schedule = _send_schedule(assignment_of, counts, ids_TLK.shape[0], ids_TLK.shape[2], device)
        sites.append(Site(comm, len(ids_TLK), send_schedule, counts.tolist(), receive, local, replicas, where))
    return sites


def _route(
    plan: BatchPlan, loads_LMRE: np.ndarray, ids_TK: np.ndarray, layer: int, micro_batch: int, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows sent, by destination, then token: first assignment of each, t * K + k; its slots there, int16 [n, K] with -1
    for assignments that go elsewhere; and how many rows each rank gets."""
    place_TK = places_of_assignments(plan, loads_LMRE, ids_TK, layer, micro_batch, rank)
    rank_TK, slot_TK = np.divmod(place_TK, plan.experts_per_rank + plan.num_slots)
    visits_RT = np.zeros((plan.num_ranks, len(ids_TK)), bool)
    token, k = np.nonzero(place_TK >= 0)
    visits_RT[rank_TK[token, k], token] = True
    destination, token = np.nonzero(visits_RT)
    here_nK = (rank_TK[token] == destination[:, None]) & (place_TK[token] >= 0)
    slots_nK = np.where(here_nK, slot_TK[token], -1).astype(np.int16)
    return (token * ids_TK.shape[1] + here_nK.argmax(1)).astype(np.int32), slots_nK, visits_RT.sum(1)


def _send_schedule(
    assignment_of: np.ndarray, counts: np.ndarray, tokens: int, top_k: int, device: torch.device
) -> Schedule:
    position_of = np.full(tokens * top_k, -1, np.int32)
    position_of[assignment_of] = np.arange(len(assignment_of))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return Schedule(
        slot_offsets=torch.from_numpy(offsets).to(device),
        assignment_of=torch.from_numpy(assignment_of).to(device),
        position_of=torch.from_numpy(position_of.reshape(-1, top_k)).to(device),
    )


def _replicas(plan: BatchPlan, layer: int, micro_batch: int, rank: int, device: torch.device) -> Replicas | None:
    if not plan.has_replicas(layer, micro_batch):
        return None
    replicas_RS, per_rank = plan.replicas[layer, micro_batch], plan.experts_per_rank
    owner_RS = np.where(replicas_RS >= 0, plan.home[layer][replicas_RS], -1)
    host, slot = np.nonzero(owner_RS == rank)
    held = np.flatnonzero(owner_RS[rank] >= 0)
    arrivals = held[np.argsort(owner_RS[rank][held], kind="stable")]
    weight_of_slot = np.zeros(per_rank + plan.num_slots, np.int32)
    weight_of_slot[:per_rank] = np.arange(per_rank)
    weight_of_slot[per_rank + arrivals] = per_rank + np.arange(len(arrivals))
    home_slots = np.searchsorted(plan.home_experts(layer)[rank], replicas_RS[host, slot])
    return Replicas(
        home_slots=torch.from_numpy(home_slots).to(device),
        push_counts=np.bincount(host, minlength=plan.num_ranks).tolist(),
        pull_counts=np.bincount(owner_RS[rank][held], minlength=plan.num_ranks).tolist(),
        weight_of_slot=torch.from_numpy(weight_of_slot).to(device),
    )


def _weight_of_slot(site: Site) -> Tensor | None:
    return None if site.replicas is None else site.replicas.weight_of_slot
