"""Rows whose experts are known only when the router has run: a padded exchange of host-known capacity.

Every rank gets every live row, with its experts, and computes what its home slots have of them; replicas take no part.
The capacity is the most live rows that any rank has in the micro-batch, known when it opens, so nothing is read back.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import ops
from ...autograd import moe_mlp_backward, moe_mlp_forward
from ...form import ExpertForm
from ...schedule import Schedule
from ...weights import ExpertWeights, gradient_buffers, main_grads, returned_gradients
from ..comm.collectives import Comm
from ..session import Session
from .layer import check_tag


@dataclass(frozen=True)
class LiveSite:
    """The live rows of one (layer, micro-batch) on one rank.

    Attributes:
        capacity: rows that every rank brings, padding included.
        slot_of_expert: int64 [E + 1], home slot on this rank, -1 elsewhere and, at its end, for expert -1.
    """

    session: Session
    comm: Comm
    tag: Tensor
    capacity: int
    slot_of_expert: Tensor
    num_slots: int
    where: str

    def gather(self, values: Tensor, kind: str) -> Tensor:
        """[capacity, ...] of every rank, rank 0 first: [R * capacity, ...]."""
        return self.comm.gather_tensors(values, f"{kind} of {self.where}", kind).flatten(0, 1)

    def give_back(self, partial: Tensor, kind: str) -> Tensor:
        """Partial results [R * capacity, ...] back to their ranks and added up in rank order: [capacity, ...]."""
        counts = [self.capacity] * self.comm.size
        rows = self.comm.exchange(partial, counts, counts, kind, f"{kind} of {self.where}")
        return rows.view(self.comm.size, self.capacity, *partial.shape[1:]).sum(0)


class LiveMLP(torch.autograd.Function):
    """`(x [capacity, H], weights [capacity, K], index [capacity, K], -1: padding) -> out [capacity, H]`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, index: Tensor, site: LiveSite, form: ExpertForm, *parameters: Tensor
    ) -> Tensor:
        home = ExpertWeights(*parameters)
        with site.session.running(site.where), site.session.ledger.span("live", x.device):
            slots = site.slot_of_expert[site.gather(index, "live routes")]
            schedule = ops.build_schedule(slots, site.num_slots)
            x_rows = site.gather(x, "live dispatch")
            weight_rows = site.gather(weights.to(torch.promote_types(weights.dtype, torch.float32)), "live dispatch")
            out_rows, h = moe_mlp_forward(x_rows, weight_rows, schedule, home, form)
            out = site.give_back(out_rows, "live combine")
        ctx.site, ctx.form, ctx.weights_dtype = site, form, weights.dtype
        ctx.main_grads, ctx.tiles = main_grads(home), schedule.tiles
        tables = schedule.slot_offsets, schedule.assignment_of, schedule.position_of
        ctx.save_for_backward(site.tag, *parameters, x_rows, h, weight_rows, *tables)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        site: LiveSite = ctx.site
        site.session.check_open(f"backward of {site.where}")
        tag, *saved = ctx.saved_tensors
        check_tag(tag, site.tag, site.where)
        home = ExpertWeights(*saved[:4])
        x_rows, h, weight_rows, slot_offsets, assignment_of, position_of = saved[4:]
        needed = ctx.needs_input_grad[5:]
        with site.session.running(site.where), site.session.ledger.span("live", dout.device):
            grad = gradient_buffers(home, ctx.main_grads, needed)
            dx_rows, dweight_rows = moe_mlp_backward(
                site.gather(dout.contiguous(), "live backward dispatch"),
                x_rows,
                h,
                weight_rows,
                Schedule(slot_offsets, assignment_of, position_of, ctx.tiles),
                home,
                ctx.form,
                grad=grad,
            )
            dx = site.give_back(dx_rows, "live backward combine")
            dweights = site.give_back(dweight_rows, "live backward combine")
        returned = returned_gradients(home, grad, ctx.main_grads, needed)
        return dx, dweights.to(ctx.weights_dtype), None, None, None, *returned
