"""The routers of a model while replays are open, or while a backward recomputes what was replayed.

A router has one replacement of its forward, however many replays there are; it finds out which of them runs now.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...alignment import LAYERS, Alignment
from ...forwards import at_end_of_backward, backward_task, forwards_now, opened
from ...planner.errors import InputError, ShapeError
from .moe_layers import MoeLayer
from .replayed_rows import Feeder
from .router_answers import answer_of


@contextmanager
def replaying_routers(layers: list[MoeLayer], feeder: Feeder, alignment: Alignment | None = None) -> Iterator[None]:
    """The routers choose what `feeder` has for the forward that runs."""
    feeder.alignment = alignment
    feeder.on_resumed = lambda: _use_in_backward(layers)
    replaced = [_replacement_of(layer) for layer in layers]
    try:
        for one in replaced:
            one.use()
        with opened(feeder):
            yield
    finally:
        for one in replaced:
            one.leave()


class _ReplacedForward:
    """What a router's forward is replaced by, as long as a replay or a backward needs it."""

    def __init__(self, layer: MoeLayer):
        self._name, self._router, self._part = layer.name, layer.router, layer.part
        self._num_experts, self._top_k = layer.num_experts, layer.top_k
        self._answer, self._key = answer_of(layer.router), id(layer.router)
        self._before = layer.router.__dict__.get("forward")
        self._original = layer.router.forward
        self._replays = 0
        self._backwards: set[int] = set()
        layer.router.forward = self.forward

    def use(self) -> None:
        self._replays += 1

    def leave(self) -> None:
        self._replays -= 1
        self._restore_if_unused()

    def use_in_backward(self) -> None:
        """Stay in place until the backward that runs now is over."""
        task = backward_task()
        if task is not None and task not in self._backwards:
            self._backwards.add(task)
            at_end_of_backward(lambda: self._end_of(task))

    def _end_of(self, task: int) -> None:
        self._backwards.discard(task)
        self._restore_if_unused()

    def _restore_if_unused(self) -> None:
        if self._replays or self._backwards or _REPLACED.pop(self._router, None) is None:
            return
        self._router.__dict__.pop("forward", None)
        if self._before is not None:
            self._router.forward = self._before

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if not compiling and backward_task() is None and not self._replays:  # left behind by a backward that failed
            self._backwards.clear()
            self._restore_if_unused()
        feeder = self._feeder()
        if feeder is None:
            return self._original(hidden_states, *args, **kwargs)
        owner, state = feeder
        if state is None:
            raise InputError(f"the router of {self._name} runs outside of the model that is replayed")
        layer = owner.layer_of_router[self._key]
        recorded_TK = state.indices[layer].to(hidden_states.device)
        tokens = hidden_states.numel() // hidden_states.shape[-1]
        if len(recorded_TK) != tokens:
            raise ShapeError(
                f"the router of {self._name} got {tokens} tokens, but the replay is for {len(recorded_TK)}{self._part}"
            )
        mode = self._answer(self._router, self._num_experts, self._top_k, recorded_TK, state.all_known)
        alignment = None if compiling or backward_task() is not None or layer >= LAYERS else owner.alignment
        mode.keep_live = alignment is not None and alignment.wanted
        with mode:
            out = self._original(hidden_states, *args, **kwargs)
        if not mode.answered:
            raise InputError(
                f"the router of {self._name} ({type(self._router).__name__}) does not choose {self._top_k} of "
                f"{self._num_experts} experts with torch.topk, so that nothing can be replayed in it"
            )
        if alignment is not None and mode.live is not None and mode.keep_live:
            alignment.compare(layer, mode.live, recorded_TK)
            if not alignment.judged_later and layer + 1 == min(LAYERS, len(owner.layer_of_router)):
                alignment.judge()
        return out

    def _feeder(self) -> tuple[Feeder, Any] | None:
        """The replay of the forward that runs now, and what it replays; None where it is none of a replay."""
        running = forwards_now()
        if running is None:
            raise InputError(
                f"the router of {self._name} is recomputed in a backward that does not say for which forward: other "
                "saved-tensor hooks hide the inputs of its checkpointed block"
            )
        found = None
        for owner, state in running:
            if isinstance(owner, Feeder) and self._key in owner.layer_of_router:
                found = owner, state
        return found


def _use_in_backward(layers: list[MoeLayer]) -> None:
    for layer in layers:
        _replacement_of(layer).use_in_backward()


_REPLACED: "WeakKeyDictionary[nn.Module, _ReplacedForward]" = WeakKeyDictionary()


def _replacement_of(layer: MoeLayer) -> _ReplacedForward:
    found = _REPLACED.get(layer.router)
    if found is None:
        found = _REPLACED[layer.router] = _ReplacedForward(layer)
    return found
