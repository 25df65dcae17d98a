"""Products of rows with the experts of their slots, where experts may have low-rank terms: `W[e] + left[e] @ right[e]`.

The terms are never added to the weights: rows go through `left` and `right` one after the other, so frozen weights need
neither a second copy nor a gradient of their size.
"""

from dataclasses import dataclass, field, replace

import torch

from . import ops
from .form import ExpertForm
from .schedule import Schedule
from .weights import ExpertWeights


@dataclass(frozen=True)
class Products:
    """Products of the rows of one schedule.

    `home`: weights of the experts at home. `replica`: those of the replica slots. `weight_of_slot`: index into home,
    then replica.
    """

    schedule: Schedule
    form: ExpertForm
    home: ExpertWeights
    replica: ExpertWeights
    weight_of_slot: torch.Tensor | None
    _narrow: dict[str, torch.Tensor] = field(default_factory=dict, compare=False)

    def plain(
        self, rows: torch.Tensor, name: str, *, transpose: bool, gather: bool = False, bias: bool = False
    ) -> torch.Tensor:
        """`rows @ W[e]`, or `rows @ W[e]^T`, of the tensor of that name alone."""
        return ops.grouped_gemm(
            rows,
            getattr(self.home, name),
            self.schedule,
            transpose_weight=transpose,
            gather=gather,
            bias=getattr(self.home, f"{name}_bias") if bias else None,
            replica_weight=getattr(self.replica, name),
            replica_bias=getattr(self.replica, f"{name}_bias") if bias else None,
            weight_of_slot=self.weight_of_slot,
        )

    def whole(
        self, rows: torch.Tensor, name: str, *, transpose: bool, gather: bool = False, bias: bool = False
    ) -> torch.Tensor:
        """As `plain`, plus the low-rank term where `name` has one."""
        out = self.plain(rows, name, transpose=transpose, gather=gather, bias=bias)
        if self.home.is_adapted(name):
            first, second = ("right", "left") if transpose else ("left", "right")
            narrow = self.narrow(rows, f"{name}_{first}", transpose=transpose, gather=gather)
            out += self.plain(narrow, f"{name}_{second}", transpose=transpose)
        return out

    def narrow(self, rows: torch.Tensor, factor: str, *, transpose: bool, gather: bool) -> torch.Tensor:
        """`rows @ factor[e]`, or `rows @ factor[e]^T`, `[rows, r]`: once.

        In a backward the product of rows with weights and the gradient of the other factor take the same one; a factor
        meets the same rows in both.
        """
        if factor not in self._narrow:
            self._narrow[factor] = self.plain(rows, factor, transpose=transpose, gather=gather)
        return self._narrow[factor]

    def gate_up(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """h `[rows, 2I]`, without a gate `[rows, I]`, and a `[rows, I]`."""
        if self.home.is_adapted("gate_up"):
            transpose = not self.form.is_transposed
            h_RJ = self.whole(x_TH, "gate_up", transpose=transpose, gather=True, bias=True)
            return h_RJ, ops.swiglu(h_RJ, self.form)
        return ops.grouped_gemm_swiglu(
            x_TH,
            self.home.gate_up,
            self.schedule,
            self.form,
            bias=self.home.gate_up_bias,
            replica_gate_up=self.replica.gate_up,
            replica_bias=self.replica.gate_up_bias,
            weight_of_slot=self.weight_of_slot,
        )

    def grad_hidden(
        self, dout_TH: torch.Tensor, h_RJ: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dh, w*a, dweights), as `reference.grad_hidden` says."""
        if self.home.is_adapted("down"):
            return self._grad_hidden_in_parts(dout_TH, h_RJ, weights_TK)
        return ops.grad_hidden(
            dout_TH,
            h_RJ,
            weights_TK,
            self.home.down,
            self.schedule,
            self.form,
            bias=self.home.down_bias,
            replica_down=self.replica.down,
            replica_bias=self.replica.down_bias,
            weight_of_slot=self.weight_of_slot,
        )

    def _grad_hidden_in_parts(
        self, dout_TH: torch.Tensor, h_RJ: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        schedule, home = self.schedule, self.home
        exact = torch.promote_types(h_RJ.dtype, torch.float32)
        g_RI = self.whole(dout_TH, "down", transpose=self.form.is_transposed, gather=True)
        gate_R1 = weights_TK.reshape(-1, 1).to(exact)[schedule.assignment_of.clamp(min=0)]
        dh_RJ, a_RI = ops.swiglu_backward((g_RI * gate_R1).to(h_RJ.dtype), h_RJ, self.form)
        dweight_R = (g_RI * a_RI).sum(1)
        if home.down_bias is not None:
            column = replace(self, home=_as_column(home), replica=_as_column(self.replica))
            dweight_R += column.plain(dout_TH, "down", transpose=False, gather=True)[:, 0]
        # row -1, of what is dropped, is the last
        dweights_TK = torch.cat([dweight_R, dweight_R.new_zeros(1)])[schedule.position_of]
        return dh_RJ, (a_RI * gate_R1).to(h_RJ.dtype), dweights_TK

    def grad_weight(
        self,
        name: str,
        grad: ExpertWeights,
        replica_grad: ExpertWeights,
        tokens: torch.Tensor,
        rows: torch.Tensor,
        *,
        tokens_left: bool,
        accumulate: bool,
    ) -> None:
        """Gradients of the weight of that name and of its factors, those of them that `grad` has buffers for.

        Args:
            tokens: `[T, ...]`, gathered. rows: `[rows, ...]`. The weight's gradient is `tokens^T rows` where
                `tokens_left`, else `rows^T tokens`.
        """

        def add(into: str, left: torch.Tensor, right: torch.Tensor, gather_left: bool, gather_right: bool) -> None:
            ops.grad_weight(
                left,
                right,
                self.schedule,
                getattr(grad, into),
                replica_grad=getattr(replica_grad, into),
                gather_left=gather_left,
                gather_right=gather_right,
                weight_of_slot=self.weight_of_slot,
                accumulate=accumulate,
            )

        left, right = (tokens, rows) if tokens_left else (rows, tokens)
        if getattr(grad, name) is not None:
            add(name, left, right, tokens_left, not tokens_left)
        if getattr(grad, f"{name}_left") is not None:  # left^T (right right_factor^T)
            narrow = self.narrow(right, f"{name}_right", transpose=True, gather=not tokens_left)
            add(f"{name}_left", left, narrow, tokens_left, False)
        if getattr(grad, f"{name}_right") is not None:
            narrow = self.narrow(left, f"{name}_left", transpose=False, gather=tokens_left)
            add(f"{name}_right", narrow, right, False, not tokens_left)

    def grad_bias(
        self,
        name: str,
        grad: ExpertWeights,
        replica_grad: ExpertWeights,
        rows: torch.Tensor,
        *,
        weights_TK: torch.Tensor | None = None,
        gather: bool = False,
        accumulate: bool,
    ) -> None:
        """Gradient of the bias of that name, if `grad` has a buffer for it."""
        if getattr(grad, name) is not None:
            ops.grad_bias(
                rows,
                self.schedule,
                getattr(grad, name),
                replica_grad=getattr(replica_grad, name),
                weights_TK=weights_TK,
                gather=gather,
                weight_of_slot=self.weight_of_slot,
                accumulate=accumulate,
            )


def _as_column(weights: ExpertWeights) -> ExpertWeights:
    """The bias of `down` `[E, H]` as a matrix of one column."""
    bias = weights.down_bias
    return ExpertWeights(None, None if bias is None else bias[:, :, None])
