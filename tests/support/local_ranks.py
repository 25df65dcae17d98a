"""An expert-parallel group whose ranks are threads of this process: as many as a real cluster has, for what is counted.

`LocalComm` is what a transport uses of `Comm`.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from relibra_kernels.parallel.tokens.one_hop import OneHop
from relibra_kernels.parallel.tokens.transport import Transport
from relibra_kernels.parallel.tokens.two_hops import TwoHops

PATIENCE = 60  # seconds


class Network:
    """All-to-alls between threads.

    Attributes:
        sent: bytes by (rank, kind, "fast" | "slow"), and got: the same of what came.
    """

    def __init__(self, gpus_per_node: int):
        self.gpus_per_node = gpus_per_node
        self.sent: Counter[tuple[int, str, str]] = Counter()
        self.got: Counter[tuple[int, str, str]] = Counter()
        self._parts: dict[tuple[object, ...], Tensor] = {}
        self._there = threading.Condition()

    def put(self, key: tuple[object, ...], source: int, kind: str, parts: dict[int, Tensor]) -> None:
        """Leave rows for each of some ranks."""
        with self._there:
            for target, rows in parts.items():
                near = source // self.gpus_per_node == target // self.gpus_per_node
                if source != target:
                    size = rows.numel() * rows.element_size()
                    self.sent[source, kind, "fast" if near else "slow"] += size
                    self.got[target, kind, "fast" if near else "slow"] += size
                self._parts[(*key, source, target)] = rows.clone()
            self._there.notify_all()

    def take(self, key: tuple[object, ...]) -> Tensor:
        with self._there:
            assert self._there.wait_for(lambda: key in self._parts, PATIENCE), f"nothing came for {key}"
            return self._parts.pop(key)


class LocalComm:
    """Some ranks of a network, seen from one of them. `name`: of two groups of the same ranks, which one this is."""

    def __init__(self, network: Network, ranks: Sequence[int], me: int, name: str = ""):
        self.ranks, self.size, self.rank = tuple(ranks), len(ranks), ranks.index(me)
        self._network, self._begun, self._name = network, 0, name

    def start(
        self, send: Tensor, send_counts: Any, receive_counts: Any, kind: str, phase: str, into: Tensor | None = None
    ) -> "LocalExchange":
        self._begun += 1
        key, me = (self._name, self.ranks, self._begun), self.ranks[self.rank]
        self._network.put(key, me, kind, dict(zip(self.ranks, send.split(list(send_counts)), strict=True)))
        received = send.new_empty(sum(receive_counts), *send.shape[1:]) if into is None else into
        return LocalExchange(self._network, key, self.ranks, me, received)

    def exchange(self, *arguments: Any) -> Tensor:
        return self.start(*arguments).wait()


class LocalExchange:
    """An all-to-all under way."""

    def __init__(self, network: Network, key: tuple[object, ...], ranks: Sequence[int], me: int, received: Tensor):
        self._network, self._keys, self._received = network, [(*key, rank, me) for rank in ranks], received

    def wait(self, _patience: float | None = None) -> Tensor:
        if self._keys:
            parts = [self._network.take(key) for key in self._keys]
            assert sum(map(len, parts)) == len(self._received)
            self._received.copy_(torch.cat(parts))
            self._keys = []
        return self._received


def make_local(name: str, network: Network, num_ranks: int, me: int, slots: int) -> Transport:
    """The transport of this name on one rank."""
    per_node = network.gpus_per_node
    everyone, (node, place) = range(num_ranks), divmod(me, per_node)
    host = LocalComm(network, everyone, me, "host")
    if name == "one":
        return OneHop(LocalComm(network, everyone, me), host)
    rail = LocalComm(network, everyone[place::per_node], me)
    return TwoHops(rail, LocalComm(network, everyone[node * per_node :][:per_node], me), host, slots)


def on_all_ranks(num_ranks: int, function: Callable[[int], Any]) -> list[Any]:
    """`function(rank)` on threads; what they return, by rank."""
    results: dict[int, Any] = {}
    failed: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = function(rank)
        except BaseException as error:
            failed[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    if failed:
        raise failed[min(failed)]
    return [results[rank] for rank in range(num_ranks)]
