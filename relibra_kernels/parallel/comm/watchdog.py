"""A warning in the log when a rank waits too long: for whom, and where that one was last seen.

Ranks run the same collectives in the same order, so whoever has begun fewer is who the others wait for. Every rank's
watchdog writes down its position in the store that the process group was made with, and reads the others' only when it
waits too long itself. A process-group timeout says only where the waiting rank was; this warning comes before it and
names the rank that is waited for.
"""

import atexit
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from .collectives import Comm

logger = logging.getLogger(__name__)
_running: dict[threading.Thread, threading.Event] = {}
_LAST_SECONDS = 10.0  # for a watchdog's last words, when the process ends


def start_watchdog(comm: Comm, seconds: float) -> Callable[[], None]:
    """Watch `comm` from a thread of its own, until it is gone, or what is returned is called."""
    if comm.size == 1:
        return lambda: None
    store = dist.PrefixStore(f"relibra-watchdog-{comm.ranks}", dist.distributed_c10d._get_default_store())
    gone = threading.Event()
    watched = weakref.ref(comm, lambda _: gone.set())
    arguments = watched, gone, store, seconds
    thread = threading.Thread(target=_watch, args=arguments, name="relibra-watchdog", daemon=True)
    _running[thread] = gone
    thread.start()
    return gone.set


@atexit.register
def _stop_all() -> None:
    """Python ends threads that still run when it exits, and one that is inside the store then aborts the process."""
    for gone in list(_running.values()):
        gone.set()
    for thread in list(_running):
        thread.join(_LAST_SECONDS)


def _watch(watched: "weakref.ref[Comm]", gone: threading.Event, store: dist.Store, seconds: float) -> None:
    try:
        _report(watched, gone, store, seconds)
    finally:
        _running.pop(threading.current_thread(), None)


def _report(watched: "weakref.ref[Comm]", gone: threading.Event, store: dist.Store, seconds: float) -> None:
    since, last, said = time.monotonic(), -1, -1
    pause = 0.0  # where this rank is, is known from the start on
    while not gone.wait(pause):
        pause, comm = seconds / 4, watched()
        if comm is None or not dist.is_initialized():
            return
        count, phase, waiting = comm.position
        if count != last:
            since, last = time.monotonic(), count
        try:
            store.set(str(comm.rank), json.dumps([count, phase]))
            waited = time.monotonic() - since
            if waiting and waited >= seconds and said != count:
                said = count
                logger.warning(describe(comm.rank, comm.size, count, phase, waited, _others(store, comm)))
        except RuntimeError:  # the store went with the rank that held it
            return
        del comm


def describe(
    rank: int, size: int, count: int, phase: str, waited: float, others: dict[int, tuple[int, str] | None]
) -> str:
    """The line: who waits where, and for whom.

    Args:
        count: collectives that this rank has begun.
        others: (collectives begun, phase of the last) of every other rank, None where it never said.
    """
    behind = []
    for other, seen in sorted(others.items()):
        if seen is None:
            behind.append(f"rank {other} (not seen yet)")
        elif seen[0] < count:
            behind.append(f"rank {other} (last seen in {seen[1] or 'nothing'}, {count - seen[0]} collectives behind)")
    who = ", ".join(behind) if behind else "no rank that is known to be behind: the network may be slow"
    return f"relibra: rank {rank} of {size} has waited {waited:.0f} s in {phase} for {who}"


def _others(store: Any, comm: Comm) -> dict[int, tuple[int, str] | None]:
    seen: dict[int, tuple[int, str] | None] = {}
    for rank in range(comm.size):
        if rank != comm.rank:
            known = store.check([str(rank)])
            seen[rank] = tuple(json.loads(store.get(str(rank)))) if known else None
    return seen
