"""How a rank that stops tells the others why, so that none of them waits for it until a timeout."""

import itertools
import json
from collections import defaultdict
from collections.abc import Sequence

import torch.distributed as dist

_RUNS: "defaultdict[tuple[int, ...], itertools.count[int]]" = defaultdict(itertools.count)


class Alarm:
    """A message board in the store of the process group. The same object on every rank must be made in the same order.

    Args:
        ranks: those that listen to each other, numbered as in the default group.
    """

    def __init__(self, ranks: Sequence[int]):
        self._ranks = tuple(ranks)
        self._run = next(_RUNS[self._ranks])
        self._turn = -1
        self._store: dist.Store | None = None

    def begin(self) -> None:
        """Begin a new board, on all ranks at once: what was said on the one before is not heard any more."""
        self._turn += 1
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"relibra-alarm-{self._ranks}-{self._run}-{self._turn}", store)

    def sound(self, rank: int, error: BaseException) -> None:
        """Say that this rank stops, and why."""
        if self._store is None:
            return
        text = " ".join(str(error).split())[:300]
        try:
            self._store.set("stopped", json.dumps([rank, f"{type(error).__name__}: {text}"]))
        except RuntimeError:  # the store went with the rank that held it
            self._store = None

    def heard(self) -> tuple[int, str] | None:
        """(the rank that stopped, its error), or None."""
        if self._store is None or not self._store.check(["stopped"]):
            return None
        rank, text = json.loads(self._store.get("stopped"))
        return rank, text
