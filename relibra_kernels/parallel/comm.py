"""The collectives of one expert-parallel group: sizes known on the host, bytes counted, errors that say where.

Every exchange is an all-to-all whose split sizes both sides already know, so nothing here reads a count from a device.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..planner.errors import CommunicationError, InputError, ReLibraError


class Comm:
    """One process group, seen from one of its ranks.

    Args:
        group: a `torch.distributed` process group; None = the default group.
        gpus_per_node: ranks of one node; traffic inside a node is counted as fast, across nodes as slow.
    """

    def __init__(self, group: dist.ProcessGroup | None, gpus_per_node: int):
        if not dist.is_initialized():
            raise InputError("torch.distributed is not initialised: start with torchrun, or call init_process_group")
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.gpus_per_node = gpus_per_node
        self.bytes_sent: Counter[tuple[str, str]] = Counter()  # (kind, "fast" | "slow") -> bytes to other ranks

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Turn a failed collective into a CommunicationError that names the phase and this rank."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what gloo and NCCL raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CommunicationError(
                f"rank {self.rank} of {self.size} failed in {phase}: {reason}. The usual cause is that another "
                "rank died, or did not answer within the process-group timeout"
            ) from error

    def exchange(
        self, send: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], kind: str, phase: str
    ) -> Tensor:
        """All-to-all of rows.

        Args:
            send: [sum(send_counts), ...], contiguous, rows for rank 0 first.
            send_counts, receive_counts: rows to and from each rank, host integers, length R.
            kind: under which name the bytes are counted.
            phase: what is going on, for the error if it fails.

        Returns: [sum(receive_counts), ...], rows of rank 0 first.
        """
        if self.size == 1:
            return send
        self._count(kind, send_counts, send[:1].numel() * send.element_size() if len(send) else 0)
        received = send.new_empty((sum(receive_counts), *send.shape[1:]))
        with self.during(phase):
            dist.all_to_all_single(received, send, list(receive_counts), list(send_counts), group=self.group)
        return received

    def gather_arrays(self, array: np.ndarray, device: torch.device, phase: str) -> np.ndarray:
        """The same-shaped integer array of every rank, stacked: [R, ...]. Once a batch, never inside a layer."""
        local = torch.from_numpy(np.ascontiguousarray(array)).to(device)
        everyone = local.new_empty((self.size, *local.shape))
        with self.during(phase):
            dist.all_gather(list(everyone.unbind(0)), local, group=self.group)
        return everyone.cpu().numpy()

    def agree(self, problem: ReLibraError | None, facts: dict[str, int], device: torch.device, what: str) -> None:
        """Let every rank go on, or none: what a rank found wrong, and numbers that must be the same on all. Collective.

        Raises: `problem` on the rank that has one, else InputError naming the rank that has, or the fact that differs.
        """
        status = np.array([problem is not None, *facts.values()], np.int64)
        everyone = self.gather_arrays(status, device, what)
        if problem is not None:
            raise problem
        refused = np.flatnonzero(everyone[:, 0])
        if len(refused):
            raise InputError(f"rank {refused[0]} stopped {what}; its own error says why")
        for name, mine, values in zip(facts, facts.values(), everyone[:, 1:].T, strict=True):
            other = np.flatnonzero(values != mine)
            if len(other):
                raise InputError(
                    f"{name} of rank {other[0]} differs from rank {self.rank}'s; every rank needs the same"
                )

    def gather_tensors(self, local: Tensor, phase: str) -> Tensor:
        """The same-shaped tensor of every rank, stacked: [R, ...]."""
        everyone = local.new_empty((self.size, *local.shape))
        with self.during(phase):
            dist.all_gather(list(everyone.unbind(0)), local.contiguous(), group=self.group)
        return everyone

    def all_reduce(self, tensor: Tensor, phase: str) -> None:
        """Sum over the group, in place."""
        if self.size > 1:
            with self.during(phase):
                dist.all_reduce(tensor, group=self.group)

    def _count(self, kind: str, send_counts: Sequence[int], row_bytes: int) -> None:
        node = self.rank // self.gpus_per_node
        for rank, rows in enumerate(send_counts):
            if rank != self.rank and rows:
                self.bytes_sent[kind, "fast" if rank // self.gpus_per_node == node else "slow"] += rows * row_bytes
