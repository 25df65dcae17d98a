"""How a MoE layer hands its forward to the runtime, and what that means for copies, state dicts and torch.compile."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..alignment import Alignment
from ..nn import ReplicatedExperts, ReplicatedMoE
from ..planner.errors import InputError
from . import opaque
from .tokens.layer import Experts

EXPERT_IDS = "expert_ids"  # in a state dict, beside a layer's experts


class Runner(Protocol):
    """Runs the layers of a model over ranks."""

    @property
    def home(self) -> np.ndarray:
        """int [L, E]: the rank that owns each expert now."""

    def recorded(self, layer: int) -> tuple[Tensor, bool] | None:
        """(expert ids int64 [tokens, K], whether none is -1) that the router is to choose; None: it chooses."""

    def alignment(self, layer: int) -> Alignment | None:
        """What compares the router's own choice with the recorded one; None where they are not compared."""

    def run(self, layer: int, experts: Experts, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The experts of one layer: [tokens, H] in their own dtype."""

    def copy(self) -> "Runner":
        """A runner for a copy of the model, independent of this one from here on."""


class AttachedLayer:
    """The `dispatcher` of a layer's experts.

    A deepcopy of the model gets a runner of its own: live routing, with the experts where they were then.
    """

    def __init__(self, runner: Runner, layer: int, rank: int):
        self.runner, self.layer, self._rank = runner, layer, rank
        self.handle = opaque.register(self)
        self.module: weakref.ref[ReplicatedExperts] | None = None  # for operators, which are given tensors only

    def __call__(self, experts: ReplicatedExperts, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return opaque.run(self.handle, experts.weights, x_TH, index_TK, weights_TK)
        if self.module is None:
            self.module = weakref.ref(experts)
        return self.run(Experts(experts.form, experts.recompute, experts.weights), x_TH, index_TK, weights_TK)

    def run(self, own: Experts, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The experts' output [tokens, H], computed in the dtype of their weights, in that of `x_TH`."""
        device, given, dtype = x_TH.device.type, x_TH.dtype, own.weights.down.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                out_TH = self.runner.run(self.layer, own, x_TH.to(dtype), index_TK, weights_TK)
        else:
            x_TH = x_TH if given == dtype else x_TH.to(dtype)
            out_TH = self.runner.run(self.layer, own, x_TH, index_TK, weights_TK)
        return out_TH if given == dtype else out_TH.to(given)

    def expert_ids(self) -> Tensor:
        """int64: the experts whose parameters this rank has, in their order."""
        return torch.from_numpy(np.flatnonzero(self.runner.home[self.layer] == self._rank))

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttachedLayer":
        key = id(self.runner)
        if key not in memo:
            memo[key] = self.runner.copy()
        return AttachedLayer(memo[key], self.layer, self._rank)

    def __reduce__(self) -> Any:
        raise InputError(
            "the model's experts are spread over ranks and cannot be pickled: use ep.save_checkpoint, or "
            "ep.named_logical_parameters"
        )


class Replay:
    """The `replay` of a layer's router: what its forward is to choose, if that is recorded."""

    def __init__(self, dispatcher: AttachedLayer):
        self._dispatcher = dispatcher

    def __call__(self) -> tuple[Tensor, bool] | None:
        return self._dispatcher.runner.recorded(self._dispatcher.layer)

    def compare(self) -> Callable[[Tensor, Tensor], None] | None:
        """What takes (the router's own choice, the recorded ids) of this forward; None: the choice is not wanted."""
        layer = self._dispatcher.layer
        alignment = self._dispatcher.runner.alignment(layer)
        return None if alignment is None else partial(alignment.compare, layer)

    def compiled(self, logits_TE: Tensor, top_k: int) -> Tensor:
        """int64 [T, K] where torch.compile traces: -1 where the router is to choose."""
        return opaque.recorded(self._dispatcher.handle, logits_TE, top_k)


def attach(moe: ReplicatedMoE, runner: Runner, layer: int, rank: int) -> None:
    """Let `runner` run a layer, and its state dict name the experts that it has."""
    moe.experts.dispatcher = attached = AttachedLayer(runner, layer, rank)
    attached.module = weakref.ref(moe.experts)
    moe.router.replay = Replay(attached)
    moe.experts.register_state_dict_post_hook(_name_experts)
    moe.experts.register_load_state_dict_pre_hook(_check_experts)


def refuse_to_save(model: nn.Module) -> None:
    """Let `save_pretrained` of transformers' models say that it would write this rank's experts only."""
    for module in model.modules():
        if hasattr(module, "save_pretrained") and not type(module).__module__.startswith("peft"):
            module.save_pretrained = _refuse  # type: ignore[assignment]


def _refuse(*_: Any, **__: Any) -> None:
    raise InputError(
        "the model's experts are spread over ranks, of which save_pretrained would write one rank's: use "
        "relibra_kernels.parallel.save_pretrained(ep, folder), which all ranks call"
    )


def _name_experts(module: nn.Module, state: dict[str, Any], prefix: str, _local: Any) -> None:
    if isinstance(module.dispatcher, AttachedLayer):
        state[prefix + EXPERT_IDS] = module.dispatcher.expert_ids()


def _check_experts(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse experts that are not those of this rank, in this order; without ids they are taken to be in order."""
    if not isinstance(module.dispatcher, AttachedLayer):
        return
    own = module.dispatcher.expert_ids()
    in_order = torch.arange(len(own)) + int(own[0]) if len(own) else own
    given = state.pop(prefix + EXPERT_IDS, in_order)
    if not torch.equal(given.cpu(), own):
        raise InputError(
            f"the state dict has the experts {given.tolist()} at {prefix}, and this rank has {own.tolist()}: experts "
            "have moved; use ep.save_checkpoint and ep.load_checkpoint, which know no placement"
        )
