"""Which forward a module runs in: the one that is open, or in a backward the one whose activations are recomputed.

A forward is open while a replay or micro-batch runs it. Activation checkpointing recomputes it within backward, when
another forward may be open, or none. So each tensor that autograd saves remembers which forwards were open when it was
saved. Recomputation unpacks the saved inputs of its block first, and that makes their forwards current again, for the
rest of that backward in that thread.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Snapshot = tuple[tuple["OpenForwards", Any], ...]


class OpenForwards:
    """Who opens forwards. `current` is the state of the one that runs now; it may change while it is open."""

    current: Any = None

    def resumed(self) -> None:
        """Called within a backward before each recomputation of a part of one of this owner's forwards."""


_OPEN: list[OpenForwards] = []  # of the process: a forward may run its layers in several threads
_SEEN = threading.local()


@contextmanager
def opened(owner: OpenForwards) -> Iterator[None]:
    """Within the block, forwards belong to `owner.current` as well; other owners that are open stay open."""

    last: Snapshot = ()

    def pack(tensor: Tensor) -> tuple[Tensor, int, Snapshot]:
        nonlocal last
        # An output that its own node saves would hold the graph in a circle, for ever where backward never runs.
        kept = tensor if tensor.is_leaf else tensor.detach()
        if not _is_now(last):  # one object for as long as it stays the same
            last = tuple([(one, one.current) for one in _OPEN])
        return kept, tensor._version, last

    def unpack(packed: tuple[Tensor, int, Snapshot]) -> Tensor:
        tensor, version, snapshot = packed
        if tensor._version != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that backward needs was modified in place: it is at version "
                f"{tensor._version}; expected version {version}"
            )
        task = torch._C._current_graph_task_id()
        if task != -1:
            _see(task, snapshot)
        return tensor

    hooks: Any = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    _OPEN.append(owner)
    try:
        with hooks:
            yield
    finally:
        _OPEN.remove(owner)


def _is_now(snapshot: Snapshot) -> bool:
    """Whether the forwards that are open are those, by identity: states may hold tensors, which cannot be compared."""
    if len(snapshot) != len(_OPEN):
        return False
    for (owner, state), one in zip(snapshot, _OPEN, strict=True):
        if owner is not one or state is not one.current:
            return False
    return True


def backward_task() -> int | None:
    """The number of the backward that this thread runs now; None outside of backward."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


def forwards_now() -> Snapshot | None:
    """(owner, state) of the forwards that run now, the innermost last. None in a backward that does not say which."""
    task = None if torch.compiler.is_compiling() else backward_task()
    if task is None:
        return tuple((owner, owner.current) for owner in _OPEN)
    return _seen().get(task)


def at_end_of_backward(call: Callable[[], Any]) -> None:
    """Have `call()` done once the backward that runs now is over; one that fails never gets there."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def _see(task: int, snapshot: Snapshot) -> None:
    """Remember the forwards until this backward is over."""
    seen = _seen()
    before = seen.get(task)
    if before is not snapshot:
        if before is None:
            at_end_of_backward(lambda: seen.pop(task, None))
        seen[task] = snapshot
    for owner, _ in snapshot:
        owner.resumed()


def _seen() -> dict[int, Snapshot]:
    """This thread's snapshots by graph task, since backwards nest. A failed one leaves an entry that is never read."""
    try:
        by_task: dict[int, Snapshot] = _SEEN.by_task
    except AttributeError:
        by_task = _SEEN.by_task = {}
    return by_task
