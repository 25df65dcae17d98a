"""`set_experts_implementation("relibra")`: the experts of a model, computed by the MoE MLP.

A family is supported where its flags and its gate are those of an `ExpertForm`: the gate is recognised by what it
computes, so a family that nobody listed here works too, or is refused by the name of what differs.
"""

import dataclasses
from typing import Any, get_args

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.integrations.moe import ExpertsInterface

from ... import ops
from ...autograd import moe_mlp
from ...compiled import moe_mlp_functional
from ...form import Activation, ExpertForm
from ...nn import ReplicatedExperts, adapted
from ...operands import check_computable
from ...planner.errors import InputError
from ...reference import swiglu
from ...weights import ExpertWeights

# torch 2.11's compiler takes no module as an argument of a function whose result it assumes to be constant.
_COMPILES_AFTER_A_FORWARD = torch.__version__.startswith("2.11.")

# Of an ExpertForm, as constants that torch.compile takes.
Flags = tuple[bool, bool, bool, Activation, float, float]


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The routed experts of one layer, as transformers calls them.

    Args:
        self: an experts module of transformers, with its weights and flags.
        hidden_states: [T, H]. top_k_index: integer [T, K]. top_k_weights: [T, K].

    Returns: [T, H] in the dtype of `hidden_states`; computed in the weights' dtype, or in autocast's.
    Raises: InputError where the module has a flag or a gate that we do not compute.
    """
    form = ExpertForm(*_flags(self))
    # choices of another rank's experts have the id num_experts and weight 0; before 5.23 nothing says if there are any
    if getattr(self, "_is_expert_parallel", True):
        top_k_index = top_k_index.masked_fill(top_k_index >= self.num_experts, -1)
    weights = adapted(self, form)
    if getattr(self, "has_post_expert_norm", False):
        return _normed(hidden_states, top_k_index, top_k_weights, weights, form, self.post_expert_norm)
    return _compute(hidden_states, top_k_index, top_k_weights, weights, form)


ExpertsInterface.register("relibra", experts_forward)


def _compute(
    hidden_states: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    weights: ExpertWeights,
    form: ExpertForm,
    recompute: bool = False,
) -> torch.Tensor:
    x_TH, weights = cast_for_experts(hidden_states, weights)
    weights_TK = weights_TK.contiguous()
    if torch.compiler.is_compiling():
        out_TH = moe_mlp_functional(x_TH, weights_TK, index_TK, weights, form, recompute=recompute)
    else:
        schedule = ops.build_schedule(index_TK, len(weights.down))
        out_TH = moe_mlp(x_TH, weights_TK, schedule, weights, form, recompute=recompute)
    return out_TH.to(hidden_states.dtype)


def _normed(
    hidden_states: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    weights: ExpertWeights,
    form: ExpertForm,
    norm: nn.Module,
) -> torch.Tensor:
    """The experts of Muse Spark, which norms each expert's output before the sum: each assignment is a row."""
    tokens, top_k = index_TK.shape
    x_RH, ones_R1 = hidden_states.repeat_interleave(top_k, 0), torch.ones_like(weights_TK).view(-1, 1)
    y_RH = norm(_compute(x_RH, index_TK.reshape(-1, 1), ones_R1, weights, form))
    gates_TK = weights_TK.masked_fill(index_TK < 0, 0.0)
    out_TH = (y_RH.view(tokens, top_k, -1) * gates_TK[..., None]).sum(1)
    return out_TH.to(hidden_states.dtype)


class FamilyExperts(ReplicatedExperts):
    """The experts of one layer of a family, with its parameters under their names and in their order.

    Forward is as `experts_forward`; with a `dispatcher`, in the weights' dtype also under autocast.

    Args:
        experts: an experts module of transformers; its parameters are shared with it.
    Raises: InputError where the module has a flag or a gate that we do not compute, or a norm after its experts.
    """

    def __init__(self, experts: nn.Module) -> None:
        refuse_norm(experts)
        form = expert_form(experts)
        num_experts, *of_down = adapted(experts, form).down.shape
        hidden_size, intermediate_size = of_down[::-1] if form.is_transposed else of_down
        super().__init__(num_experts, hidden_size, intermediate_size, form=form, device="meta")
        for name, parameter in experts._parameters.items():
            del self._parameters[name]
            self.register_parameter(name, parameter)
        self.train(experts.training)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if self.dispatcher is None:
            return _compute(hidden_states, top_k_index, top_k_weights, self.weights, self.form, self.recompute)
        out_TH: torch.Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
        return out_TH


def cast_for_experts(hidden_states: torch.Tensor, weights: ExpertWeights) -> tuple[torch.Tensor, ExpertWeights]:
    """Hidden states and gate weights, contiguous, in the weights' dtype, or in autocast's where that is on."""
    for name, weight in weights._asdict().items():
        if weight is not None:
            check_computable(name, weight)
    device, dtype = hidden_states.device.type, weights.gate_up.dtype
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return hidden_states.to(dtype).contiguous(), weights.map(lambda weight: weight.to(dtype).contiguous())


def refuse_norm(experts: Any) -> None:
    """Refuse experts that are normed one by one before they are summed: a rank adds up those it has.

    Raises: InputError.
    """
    if getattr(experts, "has_post_expert_norm", False):
        raise InputError(
            f"has_post_expert_norm of {type(experts).__name__} is True; over several ranks relibra computes experts "
            "without such a norm only. On one process set_experts_implementation('relibra') computes it"
        )


def expert_form(experts: Any) -> ExpertForm:
    """The form of an experts module of transformers. Raises: InputError, naming what is not supported."""
    name = type(experts).__name__
    layout = (bool(experts.is_transposed), bool(experts.is_concatenated), bool(experts.has_bias))
    for form in _candidates(experts, layout):
        if _gates_alike(experts, form):
            return form
    act = getattr(experts, "act_fn", None)
    gate = "_apply_gate" if experts.has_gate else "the activation without a gate"
    raise InputError(
        f"{gate} of {name} (act_fn {type(act).__name__}) is none of {', '.join(get_args(Activation))} with "
        f"is_concatenated={layout[1]}; relibra computes no other"
    )


def _candidates(experts: Any, layout: tuple[bool, bool, bool]) -> list[ExpertForm]:
    if not experts.has_gate:
        return [ExpertForm(layout[0], True, layout[2], "relu2")]
    forms = [ExpertForm(*layout), ExpertForm(*layout, "gelu_tanh")]
    limit = getattr(experts, "limit", getattr(experts, "swiglu_limit", None))
    alpha = getattr(experts, "alpha", getattr(experts, "swiglu_alpha", None))
    if limit is not None:
        forms += [ExpertForm(*layout, activation, float(limit)) for activation in ("clamped_silu", "capped_silu")]
        if alpha is not None:
            forms.append(ExpertForm(*layout, "clamped", float(limit), float(alpha)))
    return forms


def _gates_alike(experts: Any, form: ExpertForm) -> bool:
    """Whether the module's gate and ours give the same, on values on both sides of every clamp and in both layouts."""
    with torch.no_grad(), _disable_current_modes():  # torch.export's tensors have no values
        # a permutation, so that columns go together anyhow
        scrambled = torch.arange(256, dtype=torch.float64, device="cpu") * 37 % 256
        h_RJ = ((scrambled / 128 - 1) * 2 * form.limit).view(64, 4)
        theirs = experts._apply_gate(h_RJ) if form.has_gate else experts.act_fn(h_RJ)
        ours = swiglu(h_RJ, form)
        return theirs.shape == ours.shape and torch.allclose(theirs.double(), ours, rtol=1e-5, atol=1e-5)


def _flags(experts: Any) -> Flags:
    """`expert_form` of this module, found out once; under torch.compile of torch 2.11, in a forward before."""
    known = getattr(experts, "_relibra_flags", None)
    if known is None and _COMPILES_AFTER_A_FORWARD and torch.compiler.is_compiling():
        raise InputError(f"torch is {torch.__version__}: run the model once before it is compiled with fullgraph=True")
    return _find_flags(experts) if known is None else known


@torch.compiler.assume_constant_result
def _find_flags(experts: Any) -> Flags:
    experts._relibra_flags = dataclasses.astuple(expert_form(experts))
    return experts._relibra_flags
