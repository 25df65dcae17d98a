"""One MoE layer under expert parallelism: dispatch, compute, combine, and the same backwards.

Forward:  rows and gate weights go to the ranks of their experts, the weighted partial sums come back and add up.
Backward: dout goes the same way, partial dx and the gate weights' gradients come back; replicas are fetched again, or
          kept with the activations, and their gradients go to the owner. Every size is a host integer known since the
          micro-batch opened.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...autograd import NO_WEIGHTS, moe_mlp_backward, moe_mlp_forward
from ...form import ExpertForm
from ...planner.errors import InputError
from ...weights import ExpertWeights, gradient_buffers, main_grads, replica_buffers, returned_gradients
from ..experts.kept import KeptReplicas
from ..experts.replicas import GradientReturn, ReplicaPushes, ReplicaRoute
from ..session import Session
from .paths import PlannedPath


@dataclass(frozen=True)
class LayerSite:
    """Everything one rank needs to run one (layer, micro-batch): captured in forward, used again in backward.

    Attributes:
        tag: int64 [3] on the host, (batch, micro-batch, layer): saved with the activations, so that those of another
            micro-batch are not taken for this one's.
        replicas: None where the layer has none. weight_of_slot: int32 [E/R + S] there.
        next_routes: the replicas of the layer before (in backward) and after (in forward), fetched ahead.
    """

    session: Session
    layer: int
    micro_batch: int
    tag: Tensor
    path: PlannedPath
    pushes: ReplicaPushes
    kept: KeptReplicas
    replicas: ReplicaRoute | None
    weight_of_slot: Tensor | None
    next_routes: tuple[ReplicaRoute | None, ReplicaRoute | None]

    @property
    def where(self) -> str:
        return f"layer {self.layer}, micro-batch {self.micro_batch}"

    @property
    def keeps_replicas(self) -> bool:
        """Whether what was pushed in forward is saved for backward; kept ones need no second push."""
        return self.session.options.keep_replicas and self.replicas is not None and self.replicas.pushed.anywhere

    def fetch(self, *, backward: bool, hold: bool = False) -> ExpertWeights | None:
        """The replicas on this rank; begins to fetch those of the layer that comes next, unless that one keeps them."""
        with self.session.ledger.span("replica", self.path.device):
            mine = self.pushes.take(self.layer, self.micro_batch, backward, self.replicas, hold)
            if not hold and not (backward and self.session.options.keep_replicas):
                ahead = self.layer - 1 if backward else self.layer + 1
                self.pushes.start(ahead, self.micro_batch, backward, self.next_routes[not backward])
        return mine

    def start_return(self, replica_grad: ExpertWeights, home_grad: ExpertWeights) -> GradientReturn | None:
        """Gradients of pushed replicas begin their way home; those of kept replicas are added up here."""
        assert self.replicas is not None
        pushed = self.replicas.pushed
        arrivals = len(pushed.arrivals)
        if self.kept.transfers(self.layer) is not None:
            self.kept.add_gradients(self.layer, replica_grad.map(lambda grad: grad[arrivals:]))
        if not pushed.anywhere:
            return None
        phase = f"replica gradients of {self.where}"
        return GradientReturn(
            self.pushes.comm, pushed, replica_grad.map(lambda grad: grad[:arrivals]), home_grad, phase
        )


class ExpertParallelMLP(torch.autograd.Function):
    """`(x [T, H], weights [T, K], this rank's experts) -> out [T, H]`, on every rank of the group at once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, site: LayerSite, form: ExpertForm, recompute: bool, *parameters: Tensor
    ) -> Tensor:
        session, options = site.session, site.session.options
        home = ExpertWeights(*parameters)
        keep = any(ctx.needs_input_grad)
        keep_rows = keep and not options.redispatch
        exact = torch.promote_types(weights.dtype, torch.float32)
        with session.running(site.where):
            in_backward = torch._C._current_graph_task_id() != -1
            replica = site.fetch(backward=in_backward, hold=in_backward and not site.keeps_replicas)
            with session.ledger.span("dispatch", x.device):
                chunks = site.path.dispatch((x, weights.to(exact)), "dispatch", keep_rows)
            partials, saved = [], []
            for chunk in chunks:
                with session.ledger.span("dispatch", x.device):
                    x_rows, weight_rows = chunk.wait()
                    weight_rows = chunk.group.pick(weight_rows)
                with session.ledger.span("compute", x.device):
                    out_rows, h = moe_mlp_forward(
                        x_rows,
                        weight_rows,
                        chunk.group.schedule,
                        home,
                        form,
                        replica=replica,
                        weight_of_slot=site.weight_of_slot,
                        out_dtype=options.combine_dtype,
                    )
                partials.append([out_rows])
                saved += [x_rows if keep_rows else None, None if recompute else h, weight_rows if keep_rows else None]
            with session.ledger.span("combine", x.device):
                (out,) = site.path.combine(partials, "combine")
        ctx.site, ctx.form, ctx.weights_dtype = site, form, weights.dtype
        ctx.main_grads = main_grads(home)
        kept = replica if replica is not None and site.keeps_replicas else NO_WEIGHTS
        sources = (x, weights) if options.redispatch else (None, None)
        ctx.save_for_backward(site.tag, *parameters, *kept, *sources, *saved)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        site: LayerSite = ctx.site
        session, options = site.session, site.session.options
        session.check_open(f"backward of {site.where}")
        tag, *saved = ctx.saved_tensors
        check_tag(tag, site.tag, site.where)
        home, kept = ExpertWeights(*saved[:4]), ExpertWeights(*saved[4:8])
        x, weights, *rows = saved[8:]
        needed = ctx.needs_input_grad[5:]
        partials = []
        with session.running(site.where):
            replica = kept if site.keeps_replicas else site.fetch(backward=True)
            added = any(main_grad is not None for main_grad in ctx.main_grads)  # else the first chunk fills new buffers
            make = gradient_buffers if added else _new_buffers
            grad = make(home, ctx.main_grads, needed)
            replica_grad = replica_buffers(replica, grad, zeroed=added) if replica else None
            with session.ledger.span("dispatch", dout.device):
                chunks = site.path.dispatch((dout.contiguous(),), "backward dispatch", keep=False)
                if x is not None:
                    again = x, weights.to(torch.promote_types(weights.dtype, torch.float32))
                    for i, chunk in enumerate(site.path.dispatch(again, "redispatch", keep=True)):
                        x_rows, weight_rows = chunk.wait()
                        rows[3 * i], rows[3 * i + 2] = x_rows, chunk.group.pick(weight_rows)
            for i, chunk in enumerate(chunks):
                x_rows, h, weight_rows = rows[3 * i : 3 * i + 3]
                with session.ledger.span("dispatch", dout.device):
                    (dout_rows,) = chunk.wait()
                with session.ledger.span("compute", dout.device):
                    dx_rows, dweight_rows = moe_mlp_backward(
                        dout_rows,
                        x_rows,
                        h,
                        weight_rows,
                        chunk.group.schedule,
                        home,
                        ctx.form,
                        grad=grad,
                        replica=replica,
                        replica_grad=replica_grad,
                        weight_of_slot=site.weight_of_slot,
                        accumulate=added or i > 0,
                        out_dtype=options.combine_dtype,
                    )
                partials.append([dx_rows, chunk.group.spread(dweight_rows)])
            going_home = site.start_return(replica_grad, grad) if replica_grad is not None else None
            with session.ledger.span("combine", dout.device):
                dx, dweights = site.path.combine(partials, "backward combine")
            if going_home is not None:
                with session.ledger.span("replica", dout.device):
                    going_home.finish()
        returned = returned_gradients(home, grad, ctx.main_grads, needed)
        return dx.to(dout.dtype), dweights.to(ctx.weights_dtype), None, None, None, *returned


def _new_buffers(parameters: ExpertWeights, _main: ExpertWeights, needed: Sequence[bool]) -> ExpertWeights:
    """Where to write the gradients that are needed: uninitialised."""

    def new(parameter: Tensor) -> Tensor:
        return torch.empty_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))

    wanted = (p if need else None for p, need in zip(parameters, needed, strict=True))
    return ExpertWeights(*wanted).map(new)


def check_tag(got: Tensor, expected: Tensor, where: str) -> None:
    """Refuse activations that a recomputation made for another micro-batch. Both are on the host."""
    if got is not expected and not torch.equal(got, expected):
        _, micro_batch, layer = got.tolist()
        raise InputError(
            f"backward of {where} got the activations of layer {layer}, micro-batch {micro_batch}: its forward was "
            "recomputed without knowing its micro-batch"
        )
