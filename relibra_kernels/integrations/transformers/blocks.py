"""Take over the experts of a Hugging Face model, where they are: what `ExpertParallel` needs.

A family keeps its block, with its router, shared experts, biases and losses. Its experts module gives its parameters to
one of ours, and its router is asked to choose what was recorded wherever the runtime has that.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...nn import ReplicatedExperts
from ...planner.errors import InputError, ShapeError
from ...router import comparison_of
from ..taken_layer import TakenLayer
from .experts import FamilyExperts
from .moe_layers import MoeLayer, moe_layers
from .router_answers import answer_of


class FamilyRouter:
    """A family's own router, whose choice is answered by what the runtime has for the forward that runs.

    Where `replay` is set, every forward asks it for (recorded ids int64 `[T, K]`, whether no row is -1); rows of -1,
    and all where it has none (None), are chosen live.
    """

    def __init__(self, layer: MoeLayer):
        self.name, self.module = layer.name, layer.router
        self.num_experts, self.top_k = layer.num_experts, layer.top_k
        self.replay: Callable[[], tuple[Tensor | None, bool] | None] | None = None
        layer.router.forward = partial(_forward, self)


def _forward(router: FamilyRouter, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    module: Any = router.module
    original = type(module).forward
    recorded_TK, complete = (None if router.replay is None else router.replay()) or (None, False)
    if recorded_TK is None:
        return original(module, hidden_states, *args, **kwargs)
    tokens = hidden_states.numel() // hidden_states.shape[-1]
    if len(recorded_TK) != tokens:
        raise ShapeError(f"the router of {router.name} got {tokens} tokens; its replay is for {len(recorded_TK)}")
    mode = answer_of(module)(module, router.num_experts, router.top_k, recorded_TK, complete)
    compare = comparison_of(router.replay)
    mode.keep_live = compare is not None
    with mode:
        out = original(module, hidden_states, *args, **kwargs)
    if not mode.answered:
        raise InputError(
            f"the router of {router.name} ({type(module).__name__}) does not choose {router.top_k} of "
            f"{router.num_experts} experts with torch.topk, so that nothing can be replayed in it"
        )
    if compare is not None and mode.live is not None:
        compare(mode.live, recorded_TK)
    return out


def replace_moe_blocks(model: nn.Module) -> list[TakenLayer]:
    """Take over the experts of every MoE layer of `model`, in place. The blocks around them stay those of the family.

    Nothing is copied, and parameters and state dict keep their names and order. Layers that are taken over already stay
    so. Returns the layers in order.
    Raises: InputError where the model has no experts, or some that we do not compute; nothing is changed then.
    """
    found = moe_layers(model)
    ours = [layer.experts if isinstance(layer.experts, ReplicatedExperts) else None for layer in found]
    made = [FamilyExperts(layer.experts) if own is None else own for layer, own in zip(found, ours, strict=True)]
    for layer, experts in zip(found, made, strict=True):
        if experts.layer is None:
            experts.layer = TakenLayer(experts, FamilyRouter(layer))
            model.set_submodule(layer.name, experts)
    return [experts.layer for experts in made]
