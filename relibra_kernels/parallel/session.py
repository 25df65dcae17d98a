"""What all layers of one open batch share, and which micro-batch a forward belongs to."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..planner.errors import InputError
from .comm.ledger import Ledger

_SERIAL = itertools.count()
State = TypeVar("State")


@dataclass(frozen=True)
class RuntimeOptions:
    """How the runtime trades memory and exactness against time.

    redispatch:    backward fetches the received rows again instead of keeping them for every layer
    keep_replicas: replicas fetched in forward stay until backward instead of being fetched again
    overlap:       the rows that stay on their rank are computed while the others travel
    combine_dtype: torch.float32 sums a token's partial results unrounded (twice the bytes of bf16); None: the model's
    kept_bytes:   memory a rank for kept replicas over all layers; None: all that the plan keeps
    compare_dense: the first batch compares parameters outside of the experts between ranks; False where ranks hold
                   different parts of them as plain tensors (tensor parallelism)
    spare_rows:    tokens a rank and micro-batch that may choose other experts than were recorded
    watchdog_seconds: after so long in one collective a line on stderr says for whom a rank waits
    """

    redispatch: bool = False
    keep_replicas: bool = False
    overlap: bool = False
    combine_dtype: torch.dtype | None = None
    kept_bytes: int | None = None
    compare_dense: bool = True
    spare_rows: int = 0
    watchdog_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.combine_dtype not in (None, torch.float32, torch.float64):
            raise InputError(f"combine_dtype is {self.combine_dtype}; it must be torch.float32, torch.float64 or None")
        if not self.watchdog_seconds > 0:
            raise InputError(f"watchdog_seconds is {self.watchdog_seconds}; it must be positive")
        for name in ("kept_bytes", "spare_rows"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{name} is {value}; it must not be negative")


class Session:
    """One open batch."""

    def __init__(self, options: RuntimeOptions, ledger: Ledger):
        self.options, self.ledger = options, ledger
        self.serial = next(_SERIAL)
        self.is_open = True
        self._lock = threading.RLock()

    def check_open(self, what: str) -> None:
        if not self.is_open:
            raise InputError(
                f"{what} runs after its batch was closed: the experts may have moved; run it within ep.batch"
            )

    @contextmanager
    def running(self, where: str) -> Iterator[None]:
        """Only one thread at a time: two would send their collectives in an order that ranks do not share."""
        if not self._lock.acquire(blocking=False):
            raise InputError(f"{where} runs while another thread is inside an MoE layer of the same batch")
        try:
            yield
        finally:
            self._lock.release()


class ForwardContext(Generic[State]):
    """Which micro-batch a forward belongs to, in whatever thread and however late it runs.

    A forward of the model belongs to the micro-batch that is open. One that recomputes activations runs within
    backward, where another micro-batch may be open, or none. So every tensor that autograd saves while a micro-batch is
    open remembers it, the inputs of a checkpointed block among them; unpacking them, which is what a recomputation
    begins with, brings the micro-batch back for the rest of that backward in that thread.
    """

    def __init__(self) -> None:
        self.open: State | None = None
        self._seen = threading.local()

    @contextmanager
    def entered(self, state: State) -> Iterator[None]:
        """Within, forwards belong to `state`."""

        def pack(tensor: Tensor) -> tuple[Tensor, int]:
            # An output that its own node saves would hold the graph in a circle, for ever where backward never runs.
            return tensor.detach() if tensor.grad_fn is not None else tensor, tensor._version

        def unpack(packed: tuple[Tensor, int]) -> Tensor:
            tensor, version = packed
            if tensor._version != version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(tensor.shape)} that backward needs was modified in place: it is at "
                    f"version {tensor._version}; expected version {version}"
                )
            self._seen.state = torch._C._current_graph_task_id(), state
            return tensor

        before, self.open = self.open, state
        hooks: Any = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
        try:
            with hooks:
                yield
        finally:
            self.open = before

    def find(self, what: str) -> State:
        """The micro-batch of the forward that runs now. `what` is what asks, for the error."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            if self.open is None:
                raise InputError(f"{what} runs outside of a micro-batch: use `with ep.micro_batch(m)`")
            return self.open
        seen = getattr(self._seen, "state", None)
        if seen is None or seen[0] != task:
            raise InputError(
                f"{what} is recomputed in a backward that does not say for which micro-batch: other saved-tensor hooks "
                "hide the inputs of its checkpointed block"
            )
        state: State = seen[1]
        return state
