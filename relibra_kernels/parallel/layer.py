"""One MoE layer under expert parallelism: dispatch, compute, combine, and the same backwards.

Forward:  rows and gate weights go to the ranks of their experts, the weighted partial sums come back and add up.
Backward: dout goes the same way, partial dx and the gate weights' gradients come back; replicas are fetched again,
          their gradients go to the owner. Every size is a host integer known since the batch began.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..autograd import NO_WEIGHTS, moe_mlp_backward, moe_mlp_forward
from ..form import ExpertForm
from ..schedule import Schedule
from ..weights import ExpertWeights, gradient_buffers, main_grads, returned_gradients
from .comm import Comm
from .replicas import ReplicaRoute, push_weights, return_gradients


@dataclass(frozen=True)
class LayerSite:
    """Everything one rank needs to run one (layer, micro-batch): captured in forward, used again in backward.

    Attributes:
        send: tokens sorted by destination rank, a token once per rank: slots are ranks, rows what is sent.
        send_counts, receive_counts: rows to and from each rank, length R.
        local: received rows sorted by the slot on this rank; a row visits up to K of them.
        replicas: transfers of the replicas; None where the layer has none.
        pushed_slots: int64 [n], home slots that are pushed, where there are replicas.
        weight_of_slot: int32 [E/R + S] where there are replicas, else None.
        where: "layer l, micro-batch m", for errors.
    """

    comm: Comm
    send: Schedule
    send_counts: list[int]
    receive_counts: list[int]
    local: Schedule
    replicas: ReplicaRoute | None
    pushed_slots: Tensor | None
    weight_of_slot: Tensor | None
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

    def push(self, home: ExpertWeights) -> ExpertWeights | None:
        """The replicas on this rank, or None where the layer has none anywhere."""
        if self.replicas is None or self.pushed_slots is None:
            return None
        route, slots, phase = self.replicas, self.pushed_slots, f"replica weights of {self.where}"
        return home.map(lambda weight: push_weights(self.comm, route, slots, weight, phase))

    def reduce(self, replica_grad: ExpertWeights, home_grad: ExpertWeights) -> None:
        """Replicas' gradients into their owners' buffers."""
        assert self.replicas is not None and self.pushed_slots is not None
        phase = f"replica gradients of {self.where}"
        for shard, owner in zip(replica_grad.tensors(), home_grad.tensors(), strict=True):
            return_gradients(self.comm, self.replicas, self.pushed_slots, shard, owner, phase)


class ExpertParallelMLP(torch.autograd.Function):
    """`(x [T, H], weights [T, K], this rank's experts) -> out [T, H]`, on every rank of the group at once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, site: LayerSite, form: ExpertForm, recompute: bool, *parameters: Tensor
    ) -> Tensor:
        home = ExpertWeights(*parameters)
        replica = site.push(home)
        x_rows = site.dispatch(x, "dispatch")
        weight_rows = site.dispatch(weights.to(torch.promote_types(weights.dtype, torch.float32)), "dispatch")
        out_rows, h = moe_mlp_forward(
            x_rows, weight_rows, site.local, home, form, replica=replica, weight_of_slot=site.weight_of_slot
        )
        ctx.site, ctx.form, ctx.weights_dtype = site, form, weights.dtype
        ctx.main_grads = main_grads(home)
        ctx.save_for_backward(x_rows, None if recompute else h, weight_rows, *parameters)
        return site.combine(out_rows, "combine")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        site: LayerSite = ctx.site
        x_rows, h, weight_rows, *parameters = ctx.saved_tensors
        home = ExpertWeights(*parameters)
        replica = site.push(home)
        needed = ctx.needs_input_grad[5:]
        grad = gradient_buffers(home, ctx.main_grads, needed)
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
            weight_of_slot=site.weight_of_slot,
        )
        dx = site.combine(dx_rows, "backward combine")
        dweights = site.combine(dweight_rows, "backward combine")
        if replica_grad is not None:
            site.reduce(replica_grad, grad)
        returned = returned_gradients(home, grad, ctx.main_grads, needed)
        return dx, dweights.to(ctx.weights_dtype), None, None, None, *returned
