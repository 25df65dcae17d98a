"""What all layers of one open batch share, and which micro-batch a forward belongs to."""

import itertools
import operator
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..alignment import Shift, check_on_shift
from ..forwards import OpenForwards, backward_task, forwards_now, opened
from ..planner.errors import InputError
from .comm.ledger import Ledger

_SERIAL = itertools.count()
State = TypeVar("State")
TRANSPORTS = ("one", "two", "auto")


@dataclass(frozen=True)
class RuntimeOptions:
    """How the runtime trades memory and exactness against time.

    redispatch:    backward fetches the received rows again instead of keeping them for every layer
    keep_replicas: replicas fetched in forward stay until backward instead of being fetched again
    overlap:       the rows that stay on their rank are computed while the others travel
    combine_dtype: torch.float32 sums a token's partial results unrounded (twice the bytes of bf16); None: the model's
    gradient_dtype: torch.float32 adds up the gradients of bf16 and fp16 experts unrounded over the micro-batches of a
                   batch (4 bytes an element), unless they have a `main_grad`; None: in the parameters' dtype
    compare_dense: the first batch compares parameters outside of the experts between ranks; False where ranks hold
                   different parts of them as plain tensors (tensor parallelism)
    spare_rows:    tokens a rank and micro-batch that may choose other experts than were recorded
    on_shift:      whether the record is of these tokens: in the first micro-batch of a batch, the top-k sets that the
                   model's first MoE layers would choose are compared with the record. "refuse": an error where fewer
                   than 50 % are equal, a warning below 90 %. "warn": a warning below 90 %. "ignore": no comparison, for
                   records of a stale policy. None: "refuse" where the record fits a neighbouring token or layer better,
                   or where 1,000 (token, layer) pairs of a rank or more were compared; else "warn"
    transport:     how tokens travel between nodes: "one" hop, straight to the rank; "two" hops, once to a node and then
                   inside it, which adds up partial sums in the node first; "auto": what costs less on this cluster by
                   the price model
    live_wait_seconds: how long a rank that runs one forward after another without a batch waits for the others to begin
                   the next one. It applies where the forward before ended less than a second ago
    timed_every:   one of so many micro-batches has its layers timed by part, for `ep.stats()`; 0: none
    watchdog_seconds: after so long in one collective a warning in the log says for whom a rank waits
    """

    redispatch: bool = False
    keep_replicas: bool = False
    overlap: bool = False
    combine_dtype: torch.dtype | None = None
    gradient_dtype: torch.dtype | None = torch.float32
    compare_dense: bool = True
    spare_rows: int = 0
    on_shift: Shift | None = None
    transport: str = "auto"
    live_wait_seconds: float = 9.0
    timed_every: int = 8
    watchdog_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.combine_dtype not in (None, torch.float32, torch.float64):
            raise InputError(f"combine_dtype is {self.combine_dtype}; it must be torch.float32, torch.float64 or None")
        if self.gradient_dtype not in (None, torch.float32):
            raise InputError(f"gradient_dtype is {self.gradient_dtype}; it must be torch.float32 or None")
        check_on_shift(self.on_shift)
        if self.transport not in TRANSPORTS:
            raise InputError(f"transport is {self.transport!r}; it must be one of {', '.join(TRANSPORTS)}")
        for name in ("watchdog_seconds", "live_wait_seconds"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("spare_rows", "timed_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")


class Session:
    """One open batch."""

    def __init__(self, options: RuntimeOptions, ledger: Ledger):
        self.options, self.ledger = options, ledger
        self.serial = next(_SERIAL)
        self.is_open = True
        self._checked: dict[int, tuple[torch.Tensor | None, ...]] = {}
        self._lock = threading.RLock()

    def times(self, micro_batch: int, num_micro_batches: int) -> bool:
        """Whether the layers of a micro-batch are timed: not of the first, which warms up, where there are others."""
        every = self.options.timed_every
        return every > 0 and micro_batch % every == min(every, num_micro_batches) // 2

    def checked(self, layer: int, weights: tuple[torch.Tensor | None, ...]) -> bool:
        """Whether a layer of this batch has run with these very weights, and note that it does now."""
        before = self._checked.get(layer)
        if before is not None and all(map(operator.is_, before, weights)):
            return True
        self._checked[layer] = weights
        return False

    def check_open(self, what: str) -> None:
        if not self.is_open:
            raise InputError(
                f"{what} runs after its batch was closed: the experts may have moved; run it within ep.batch"
            )

    def running(self, where: str) -> "_Running":
        """Refuse a second thread within: two would send their collectives in an order that ranks do not share."""
        return _Running(self._lock, where)


class _Running(AbstractContextManager[None]):
    def __init__(self, lock: threading.RLock, where: str):
        self._lock, self._where = lock, where

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise InputError(f"{self._where} runs while another thread is inside an MoE layer of the same batch")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class ForwardContext(OpenForwards, Generic[State]):
    """Which micro-batch a forward of the model belongs to, in whatever thread and however late it runs."""

    current: State | None = None

    @property
    def open(self) -> State | None:
        """The micro-batch that is open."""
        return self.current

    @contextmanager
    def entered(self, state: State | None) -> Iterator[None]:
        """Within, forwards belong to `state`, or to what `current` is set to."""
        before, self.current = self.current, state
        try:
            with opened(self):
                yield
        finally:
            self.current = before

    @property
    def recomputes(self) -> bool:
        """Whether this thread runs a backward, so that a forward within it recomputes activations."""
        return backward_task() is not None

    def find(self) -> State | None:
        """The micro-batch of the forward that runs now; None where it belongs to none, or does not say to which."""
        if backward_task() is None:
            return self.current
        return next((state for owner, state in forwards_now() or () if owner is self), None)
