"""One MoE layer under expert parallelism: dispatch, compute, combine, and the same backwards.

Forward:  rows, gate weights and slots go to the ranks of their experts in one payload; the weighted partial sums come
          back and add up.
Backward: dout goes the same way; partial dx and the gate weights' gradients come back in one payload. Replicas are
          fetched again, or were kept with the activations, and their gradients go to the owner.
Every size is a host integer known before the layer runs: nothing waits for the device.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...autograd import NO_WEIGHTS, moe_mlp_backward, moe_mlp_forward
from ...form import ExpertForm
from ...planner.errors import InputError
from ...weights import (
    ExpertWeights,
    gradient_buffers,
    gradients_asked_for,
    main_grads,
    replica_buffers,
    returned_gradients,
)
from ..experts.accumulation import GradientSums
from ..experts.kept import KeptReplicas
from ..experts.replicas import GradientReturn, ReplicaPushes, ReplicaRoute
from ..session import Session
from .transport import TokenPath


class Experts(NamedTuple):
    """The experts of one layer that are on this rank.

    `recompute`: save no pre-activation; backward computes it again.
    """

    form: ExpertForm
    recompute: bool
    weights: ExpertWeights


@dataclass(frozen=True)
class LayerSite:
    """Everything one rank needs to run one (layer, micro-batch): captured in forward, used again in backward.

    Attributes:
        pushes, kept: of the batch; None where none is open.
        tag: int64 [3] on the host, (batch, micro-batch, layer): saved with the activations, so that those of another
            micro-batch are not taken for this one's.
        replicas: None where the layer has none. weight_of_slot: int32 [E/R + S] there.
        next_routes: the replicas of the layer before (in backward) and after (in forward), fetched ahead.
        timed: whether its parts are.
    """

    session: Session
    layer: int
    micro_batch: int
    tag: Tensor
    path: TokenPath
    pushes: ReplicaPushes | None
    kept: KeptReplicas | None
    replicas: ReplicaRoute | None
    weight_of_slot: Tensor | None
    next_routes: tuple[ReplicaRoute | None, ReplicaRoute | None]
    device: torch.device
    sums: GradientSums | None = None
    timed: bool = False

    @property
    def where(self) -> str:
        return f"layer {self.layer}, micro-batch {self.micro_batch}"

    def span(self, part: str) -> AbstractContextManager[None]:
        return self.session.ledger.layer_span(part, self.device, self.timed)

    def sums_of(self, parameters: ExpertWeights) -> ExpertWeights:
        """Where gradients of the parameters are added up: their `main_grad`, or a sum of the batch; None: autograd."""
        return main_grads(parameters) if self.sums is None else self.sums.of_layer(self.layer, parameters)

    @property
    def keeps_replicas(self) -> bool:
        """Whether what was pushed in forward is saved for backward; kept ones need no second push."""
        return self.session.options.keep_replicas and self.replicas is not None and self.replicas.pushed.anywhere

    def fetch(self, *, backward: bool, hold: bool = False) -> ExpertWeights | None:
        """The replicas on this rank; begins to fetch those of the layer that comes next, unless that one keeps them."""
        if self.pushes is None or (self.replicas is None and self.next_routes[not backward] is None):
            return None
        with self.span("replica"):
            mine = self.pushes.take(self.layer, self.micro_batch, backward, self.replicas, hold)
            if not hold and not (backward and self.session.options.keep_replicas):
                ahead = self.layer - 1 if backward else self.layer + 1
                self.pushes.start(ahead, self.micro_batch, backward, self.next_routes[not backward])
        return mine

    def replica_gradients(self, replica: ExpertWeights, grad: ExpertWeights, added: bool) -> ExpertWeights:
        """Buffers for the replicas' gradients: the sums of the batch where these are kept replicas alone.

        Args:
            grad: the buffers of the homes. added: whether gradients are added to what is there, and do not overwrite.
        """
        assert self.replicas is not None and self.kept is not None
        if added and self.replicas.only_kept and self.kept.weights(self.layer) is not None:
            return self.kept.gradients(self.layer, grad)
        return replica_buffers(replica, grad, zeroed=added)

    def start_return(self, replica_grad: ExpertWeights, grad: ExpertWeights) -> GradientReturn | None:
        """Gradients of pushed replicas begin their way home; those of kept replicas are added up here.

        Args: as for `replica_gradients`, which gave the buffers.
        """
        assert self.replicas is not None and self.kept is not None and self.pushes is not None
        pushed = self.replicas.pushed
        arrivals = len(pushed.arrivals)
        if self.kept.weights(self.layer) is not None:
            for total, new in zip(self.kept.gradients(self.layer, grad), replica_grad, strict=True):
                if total is not new:
                    total.add_(new[arrivals:])
        if not pushed.anywhere:
            return None
        phase = f"replica gradients of {self.where}"
        return GradientReturn(self.pushes.comm, pushed, replica_grad.map(lambda grad: grad[:arrivals]), phase)

    def finish_return(self, going_home: GradientReturn, home_grad: ExpertWeights) -> None:
        """Add what came back of pushed replicas to the gradients of the homes or kept replicas that sent them."""
        assert self.replicas is not None and self.kept is not None
        sends_kept = self.replicas.pushed.sends_kept
        going_home.finish(home_grad, self.kept.gradients(self.layer, home_grad) if sends_kept else None)


def run_layer(x_TH: Tensor, weights_TK: Tensor, site: LayerSite, experts: Experts) -> Tensor:
    """The layer's experts, differentiable: [T, H]."""
    return ExpertParallelMLP.apply(
        x_TH.contiguous(), weights_TK, site, experts.form, experts.recompute, *experts.weights
    )


class ExpertParallelMLP(torch.autograd.Function):
    """`(x [T, H], weights [T, K], this rank's experts) -> out [T, H]`, on every rank of the group at once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, site: LayerSite, form: ExpertForm, recompute: bool, *parameters: Tensor
    ) -> Tensor:
        session, options = site.session, site.session.options
        home = ExpertWeights(*parameters)
        keep_rows = any(ctx.needs_input_grad) and not options.redispatch
        gates = as_gates(weights, x.dtype)
        with session.running(site.where):
            checked = session.checked(site.layer, parameters)
            in_backward = torch._C._current_graph_task_id() != -1
            replica = site.fetch(backward=in_backward, hold=in_backward and not site.keeps_replicas)
            with site.span("dispatch"):
                arriving = site.path.dispatch(x, gates, "dispatch")
            saved = []
            for index, arrive in enumerate(arriving):
                with site.span("dispatch"):
                    chunk = arrive()
                with site.span("compute"):
                    room = site.path.room(index, x.shape[1], options.combine_dtype or x.dtype)
                    _, h = moe_mlp_forward(
                        chunk.x,
                        chunk.weights,
                        chunk.group.schedule,
                        home,
                        form,
                        replica=replica,
                        weight_of_slot=site.weight_of_slot,
                        out=room,
                        checked=checked,
                    )
                rows = (chunk.x, chunk.weights) if keep_rows else (None, None)
                saved += [*rows, None if recompute else h]
            with site.span("combine"):
                out = site.path.combine("combine")
        ctx.site, ctx.form, ctx.weights_dtype = site, form, weights.dtype
        is_leaf = [parameter is None or parameter.is_leaf for parameter in parameters]
        ctx.owners = home if all(is_leaf) else home.map(lambda parameter: parameter if parameter.is_leaf else None)
        kept = replica if replica is not None and site.keeps_replicas else NO_WEIGHTS
        sources = (x, gates) if options.redispatch else (None, None)
        ctx.save_for_backward(site.tag, *parameters, *kept, *sources, *saved)
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        site: LayerSite = ctx.site
        session, options = site.session, site.session.options
        session.check_open(f"backward of {site.where}")
        tag, *saved = ctx.saved_tensors
        check_tag(tag, site.tag, site.where)
        count = len(ExpertWeights._fields)
        home, kept = ExpertWeights(*saved[:count]), ExpertWeights(*saved[count : 2 * count])
        x, gates, *rows = saved[2 * count :]
        needed = gradients_asked_for(ctx, home)
        partials = []
        with session.running(site.where):
            replica = kept if site.keeps_replicas else site.fetch(backward=True)
            sums = site.sums_of(ctx.owners)
            added = any(of_parameter is not None for of_parameter in sums)  # else the first chunk fills new buffers
            make = gradient_buffers if added else _new_buffers
            grad = make(home, sums, needed)
            replica_grad = site.replica_gradients(replica, grad, added) if replica else None
            with site.span("dispatch"):
                arriving = site.path.dispatch_rows(dout.contiguous(), "backward dispatch")
                if x is not None:
                    for i, arrive in enumerate(site.path.dispatch(x, gates, "redispatch")):
                        chunk = arrive()
                        rows[3 * i], rows[3 * i + 1] = chunk.x, chunk.weights
            for i, arrive_rows in enumerate(arriving):
                x_rows, weight_rows, h = rows[3 * i : 3 * i + 3]
                group = site.path.groups[i]
                with site.span("dispatch"):
                    dout_rows = arrive_rows()
                with site.span("compute"):
                    dx_rows, dweight_rows = moe_mlp_backward(
                        dout_rows,
                        x_rows,
                        h,
                        weight_rows,
                        group.schedule,
                        home,
                        ctx.form,
                        grad=grad,
                        replica=replica,
                        replica_grad=replica_grad,
                        weight_of_slot=site.weight_of_slot,
                        accumulate=added or i > 0,
                        out_dtype=options.combine_dtype,
                        checked=True,
                    )
                partials.append((dx_rows, group.spread(dweight_rows)))
            going_home = site.start_return(replica_grad, grad) if replica_grad is not None else None
            with site.span("combine"):
                dx, dweights = site.path.combine_gradients(partials, "backward combine", ctx.weights_dtype)
            if going_home is not None:
                with site.span("replica"):
                    site.finish_return(going_home, grad)
        returned = returned_gradients(home, grad, sums, needed)
        return dx if dx.dtype == dout.dtype else dx.to(dout.dtype), dweights, None, None, None, *returned


def as_gates(weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """The gate weights in the dtype in which they travel: fp32, or float64 beside rows of float64."""
    wide = torch.promote_types(dtype, torch.float32)
    return weights_TK if torch.promote_types(weights_TK.dtype, torch.float32) == wide else weights_TK.to(wide)


def _new_buffers(parameters: ExpertWeights, _main: ExpertWeights, needed: Sequence[bool]) -> ExpertWeights:
    """Where to write the gradients that are needed: uninitialised."""

    def new(parameter: Tensor) -> Tensor:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return torch.empty(parameter.shape, dtype=dtype, device=parameter.device)

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
