"""The collectives of one expert-parallel group: sizes known on the host, bytes counted, errors that say where.

Every exchange is an all-to-all whose split sizes both sides already know, so nothing here reads a count from a device.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...planner.errors import CommunicationError, InputError, ReLibraError
from .alarm import Alarm
from .ledger import Ledger

_MADE: Counter[tuple[int, ...]] = Counter()  # so far, by ranks: in one order on all of them
# Bytes up to which a rank tells each other rank what is gathered: an all-gather over gloo goes around in a ring, and of
# a few bytes takes two to three times the CPU time (measured, 4 ranks).
TOLD_TO_EACH = 1 << 16
LISTEN = timedelta(seconds=1)  # between looks at whether another rank has stopped


@dataclass
class CollectiveProgress:
    """How far a rank is in the collectives that all ranks come to in one order.

    `position`: (collectives begun, phase of the last one, whether the host waits for it). `last`: what a device waits
    for.
    """

    position: tuple[int, str, bool] = (0, "", False)
    last: dist.Work | None = None


class Comm:
    """One process group, seen from one of its ranks.

    Args:
        group: a `torch.distributed` process group; None = the default group.
        gpus_per_node: ranks of one node; traffic inside a node is counted as fast, across nodes as slow.
        ledger: where bytes and seconds are written; its own where None.
        part_of: a group of which this one is a part that takes its turns among that one's collectives: one watchdog
            sees both, and errors name the rank as that group does.

    Attributes:
        alarm: where ranks say that they stop; None: nobody does.
        ranks: of the default group, in the order of this one.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        gpus_per_node: int,
        ledger: Ledger | None = None,
        part_of: "Comm | None" = None,
    ):
        if not dist.is_initialized():
            raise InputError("torch.distributed is not initialised: start with torchrun, or call init_process_group")
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.gpus_per_node = gpus_per_node
        self.ledger = Ledger() if ledger is None else ledger
        self._name: tuple[int, int] = (self.rank, self.size) if part_of is None else part_of._name
        self._progress: CollectiveProgress = CollectiveProgress() if part_of is None else part_of._progress
        self.alarm: Alarm | None = None
        self._waits_on_host = dist.get_backend(group) == "gloo"  # with others, a stream waits and the host goes on
        self.ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        self._serial = _MADE[self.ranks]  # in the store, where an earlier one of these ranks has left its names
        _MADE[self.ranks] += 1

    @property
    def position(self) -> tuple[int, str, bool]:
        """(collectives begun, phase of the last one, whether it is still under way), for the watchdog."""
        count, phase, waiting = self._progress.position
        last = self._progress.last
        return count, phase, waiting or (last is not None and not last.is_completed())

    @property
    def device(self) -> torch.device:
        """Where collectives of this group want their tensors."""
        on_gpu = "nccl" in dist.get_backend(self.group)
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    @property
    def bytes_sent(self) -> Counter[tuple[str, str]]:
        """Bytes to other ranks since the beginning, by (kind, "fast" | "slow")."""
        return self.ledger.bytes_sent

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Turn a failed collective into a CommunicationError that names the phase and this rank."""
        self.begins(phase)
        try:
            yield
        except RuntimeError as error:
            raise self.failure(error, phase) from error
        self.is_over(phase)

    def begins(self, phase: str) -> None:
        """Note for the watchdog: the host begins a collective, or to wait for one."""
        self._progress.position = (self._progress.position[0] + 1, phase, True)

    def is_over(self, phase: str) -> None:
        """Note for the watchdog: what `begins` noted is over."""
        self._progress.position = (self._progress.position[0], phase, False)

    def failure(self, error: RuntimeError, phase: str) -> RuntimeError | CommunicationError:
        """The library's error for one that gloo or NCCL raised."""
        if isinstance(error, torch.OutOfMemoryError):
            return error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        rank, size = self._name
        return CommunicationError(
            f"rank {rank} of {size} failed in {phase}: {reason}. The usual cause is that another "
            "rank died, or did not answer within the process-group timeout"
        )

    def wait(self, work: dist.Work, patience: float | None = None) -> None:
        """Wait until the collective is over, or another rank has said that it stops. On GPUs the current stream waits.

        Args:
            patience: seconds that the host waits at most for ranks that have not begun it; None: until the process
                group gives up.
        Raises: CommunicationError naming the rank that stopped, and its error, or those that did not come in time.
        """
        begin = time.monotonic()
        if not self._waits_on_host:
            self._progress.last = work
            work.wait()
            return
        while True:
            try:
                work.wait(LISTEN)
                return
            except RuntimeError:
                if work.is_completed():  # it failed, or it came while the wait gave up
                    work.wait()
                    return
            heard = self.alarm.heard() if self.alarm is not None else None
            if heard is not None:
                rank, reason = heard
                raise CommunicationError(
                    f"rank {self._name[0]} stopped waiting for rank {rank}, which stopped: {reason}"
                )
            if patience is not None:
                missing = self._missing()
                if missing and time.monotonic() - begin >= patience:
                    raise CommunicationError(
                        f"rank {self._name[0]} has waited {patience:g} s for rank {', '.join(map(str, missing))}"
                    )

    def warm(self) -> None:
        """Exchange a byte with every rank: what connects them is made now, and not in the first layer. Collective."""
        if self.size == 1:
            return
        byte_R = torch.zeros(self.size, dtype=torch.uint8, device=self.device)
        with self.during("connecting the ranks of a process group"):
            each = [1] * self.size
            self.wait(dist.all_to_all_single(byte_R.clone(), byte_R, each, each, group=self.group, async_op=True))

    def _missing(self) -> list[int]:
        """Write to the store that this rank waits in its last collective; return the ranks that have not written so."""
        default = dist.distributed_c10d._get_default_store()
        store = dist.PrefixStore(f"relibra-waiting-{self.ranks}-{self._serial}-{self._progress.position[0]}", default)
        store.set(str(self.rank), "")
        return [rank for place, rank in enumerate(self.ranks) if not store.check([str(place)])]

    def start(
        self,
        send: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        kind: str,
        phase: str,
        into: Tensor | None = None,
    ) -> "Exchange":
        """Begin an all-to-all of rows, to be waited for.

        Args:
            send: [sum(send_counts), ...], contiguous, rows for rank 0 first.
            send_counts, receive_counts: rows to and from each rank, host integers, length R.
            kind: under which name the bytes are counted.
            phase: what is going on, for the error if it fails.
            into: [sum(receive_counts), ...], where to receive; new memory where None.
        """
        rows = send.shape[0]
        if rows:
            self._count(kind, send_counts, send.nbytes // rows)
        received = send.new_empty((sum(receive_counts), *send.shape[1:])) if into is None else into
        if self.size == 1:
            return Exchange(self, received.copy_(send) if into is not None else send, None, phase, send)
        self.begins(phase)
        try:
            work = dist.all_to_all_single(received, send, receive_counts, send_counts, group=self.group, async_op=True)
        except RuntimeError as error:
            raise self.failure(error, phase) from error
        self.is_over(phase)
        return Exchange(self, received, work, phase, send)

    def exchange(
        self,
        send: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        kind: str,
        phase: str,
        into: Tensor | None = None,
    ) -> Tensor:
        """`start` and wait: [sum(receive_counts), ...], rows of rank 0 first."""
        return self.start(send, send_counts, receive_counts, kind, phase, into).wait()

    def gather_arrays(self, array: np.ndarray, device: torch.device, phase: str) -> np.ndarray:
        """The same-shaped integer array of every rank, stacked: [R, ...]. Once a batch, never inside a layer."""
        local = torch.from_numpy(np.ascontiguousarray(array)).to(device)
        return self.gather_tensors(local, phase).numpy(force=True)

    def gather_tensors(self, local: Tensor, phase: str) -> Tensor:
        """The same-shaped tensor of every rank, stacked: [R, ...]."""
        everyone = local.new_empty((self.size, *local.shape))
        with self.during(phase):
            if local.nbytes <= TOLD_TO_EACH:
                told, each = local.expand(everyone.shape).contiguous(), [1] * self.size
                work = dist.all_to_all_single(everyone, told, each, each, group=self.group, async_op=True)
            else:
                work = dist.all_gather(list(everyone.unbind(0)), local.contiguous(), group=self.group, async_op=True)
            self.wait(work)
        return everyone

    def agree(
        self,
        problem: ReLibraError | None,
        facts: dict[str, int],
        device: torch.device,
        what: str,
        also: Sequence[int] = (),
    ) -> np.ndarray:
        """Exchange what ranks found wrong, and numbers that must be equal: all ranks go on, or all raise. Collective.

        Returns: int64 [R, len(also)], numbers that may differ.
        Raises: `problem` on the rank that has one, else InputError naming the rank that has, or the fact that differs.
        """
        status = np.array([problem is not None, *facts.values(), *also], np.int64)
        everyone = self.gather_arrays(status, device, what)
        if problem is not None:
            raise problem
        refused = np.flatnonzero(everyone[:, 0])
        if len(refused):
            raise InputError(f"rank {self.ranks[refused[0]]} stopped {what}; its own error says why")
        for name, values in zip(facts, everyone[:, 1:].T, strict=False):
            if (values == values[0]).all():
                continue
            kinds, counts = np.unique(values, return_counts=True)
            usual = kinds[counts == counts.max()]  # who is in the minority is who differs; of two halves, the one
            usual = values[0] if values[0] in usual else usual[0]  # without rank 0
            other, agreeing = np.flatnonzero(values != usual), np.flatnonzero(values == usual)
            raise InputError(
                f"{name} of rank {self.ranks[other[0]]} differs from rank {self.ranks[agreeing[0]]}'s; every rank "
                "needs the same"
            )
        return everyone[:, 1 + len(facts) :]

    def all_reduce(self, tensor: Tensor, phase: str) -> None:
        """Sum over the group, in place."""
        if self.size > 1:
            with self.during(phase):
                self.wait(dist.all_reduce(tensor, group=self.group, async_op=True))

    def _count(self, kind: str, send_counts: Sequence[int], row_bytes: int) -> None:
        first = self.rank // self.gpus_per_node * self.gpus_per_node
        inside = sum(send_counts[first : first + self.gpus_per_node])
        near, far = inside - send_counts[self.rank], sum(send_counts) - inside
        if near:
            self.ledger.add_bytes(kind, True, near * row_bytes)
        if far:
            self.ledger.add_bytes(kind, False, far * row_bytes)


@dataclass
class Exchange:
    """An all-to-all under way. `send` must live until it is over."""

    comm: Comm
    received: Tensor
    work: dist.Work | None
    phase: str
    send: Tensor | None

    def wait(self, patience: float | None = None) -> Tensor:
        """The received rows; on GPUs the current stream waits, not the host.

        Args: patience: as for `Comm.wait`.
        """
        if self.work is not None:
            self.comm.begins(self.phase)
            try:
                self.comm.wait(self.work, patience)
            except RuntimeError as error:
                raise self.comm.failure(error, self.phase) from error
            self.comm.is_over(self.phase)
            self.work = None
        self.send = None
        return self.received
