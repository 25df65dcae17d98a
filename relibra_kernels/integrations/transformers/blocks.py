"""Take over the experts of a Hugging Face model, where they are: what `ExpertParallel` needs.

A family keeps its block, with its router, shared experts, biases and losses. Its experts module gives its parameters to
one of ours, and its router is asked to choose what was recorded wherever the runtime has that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...planner.errors import InputError, ShapeError
from .answers import answer_of
from .experts import FamilyExperts
from .layers import MoeLayer, moe_layers


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
    with mode:
        out = original(module, hidden_states, *args, **kwargs)
    if not mode.answered:
        raise InputError(
            f"the router of {router.name} ({type(module).__name__}) does not choose {router.top_k} of "
            f"{router.num_experts} experts with torch.topk, so that nothing can be replayed in it"
        )
    return out


@dataclass(eq=False)
class FamilyLayer:
    """An MoE layer of a family, as the runtime sees it: the experts that are here, and the router that it replays."""

    experts: FamilyExperts
    router: FamilyRouter


def replace_moe_blocks(model: nn.Module) -> list[FamilyLayer]:
    """Take over the experts of every MoE layer of `model`, in place. The blocks around them stay those of the family.

    Nothing is copied, and parameters and state dict keep their names and order. Layers that are taken over already stay
    so. Returns the layers in order.
    Raises: InputError where the model has no experts, or some that we do not compute; nothing is changed then.
    """
    found = moe_layers(model)
    taken: list[Any] = [getattr(layer.experts, "layer", None) or FamilyExperts(layer.experts) for layer in found]
    for index, (layer, experts) in enumerate(zip(found, taken, strict=True)):
        if isinstance(experts, FamilyExperts):
            experts.layer = taken[index] = FamilyLayer(experts, FamilyRouter(layer))
            model.set_submodule(layer.name, experts)
    return taken
