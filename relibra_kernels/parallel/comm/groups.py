"""The process groups of a run: one for the experts, one beside it for replicas, and those that hold copies."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ...planner import ClusterSpec
from ...planner.errors import CommunicationError, InputError, ReLibraError
from .at_exit import wait_for_workers
from .collectives import Comm


@dataclass
class _Made:
    """A process group that was made here. `users`: runs that have not closed it."""

    key: tuple[object, ...]
    default: dist.ProcessGroup
    group: dist.ProcessGroup
    users: int = 0


# Dimensions whose ranks hold other layers, or share the tokens of one sequence: their experts are no copies.
_NOT_COPIES = {"pp": "pipeline", "tp": "tensor", "cp": "context", "sp": "sequence"}

_MADE: dict[tuple[object, ...], _Made] = {}


def timeout_of(group: dist.ProcessGroup | None) -> timedelta | None:
    """How long collectives of a group wait: those beside it are to wait as long. None: torch's default."""
    group = group or dist.group.WORLD
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    options = getattr(group._get_backend(torch.device(device)), "options", None)  # type: ignore[union-attr]
    return getattr(options, "_timeout", None)


class Groups:
    """Seen from one rank.

    Args:
        mesh: one dimension, the expert-parallel group; or two, of which the one named "ep" is it. None: the default
            group.

    Attributes:
        experts: the expert-parallel group. side: the same ranks, for replica weights. host: the same ranks, for what
            hosts tell each other while their devices work.
        copies: groups of ranks that own the same experts; none where there is one expert-parallel group.
        node, rail: parts of the expert-parallel group, there after `split`: this rank's node, and the ranks of the same
            place on every node.
        all: the groups to reduce over, one after the other, for a sum over all ranks.
        copy: which of the expert-parallel groups this rank is in.
    """

    def __init__(self, mesh: DeviceMesh | None, cluster: ClusterSpec):
        wait_for_workers()
        group, others = None, []
        if mesh is not None:
            names = mesh.mesh_dim_names or ()
            if mesh.ndim > 2 or (mesh.ndim == 2 and "ep" not in names):
                raise InputError(
                    f"mesh has {mesh.ndim} dimensions, named {names}; it must have one, or two of which one is 'ep'"
                )
            split = next((name for name in names if name in _NOT_COPIES), None) if mesh.ndim == 2 else None
            if split is not None:
                raise InputError(
                    f"mesh has the dimension {split!r} beside 'ep', but {_NOT_COPIES[split]} parallelism is not "
                    "supported there: the other dimension must be of ranks that hold copies of the experts and train "
                    "other sequences"
                )
            inner = names.index("ep") if mesh.ndim == 2 else 0
            group = mesh.get_group(inner)
            others = [mesh.get_group(1 - inner)] if mesh.ndim == 2 else []
        self.experts = Comm(group, cluster.gpus_per_node)
        if self.experts.size != cluster.num_ranks:
            raise InputError(f"cluster has {cluster.num_ranks} ranks, the process group {self.experts.size}")
        alone = self.experts.size == 1
        self._made: list[_Made] = []
        self.node: Comm | None = None
        self.rail: Comm | None = None
        beside = group if alone else self._new_group("side", None)
        self.side = Comm(beside, cluster.gpus_per_node, self.experts.ledger)
        between_hosts = group
        if not alone and dist.get_backend(group) != "gloo":
            between_hosts = self._new_group("host", "gloo")
        self.host = Comm(between_hosts, cluster.gpus_per_node, self.experts.ledger)
        self.copies = [Comm(other, 1) for other in others if dist.get_world_size(other) > 1]
        self.all = [self.experts, *self.copies]
        self.copy = self.copies[0].rank if self.copies else 0
        self.shape = tuple(comm.size for comm in self.all)
        for comm in self.every:
            comm.warm()

    def split(self) -> tuple[Comm, Comm]:
        """Make the groups `node` and `rail` and return them. All ranks must call this at once.

        They are made again where a node has another number of ranks than before.
        """
        experts, per_node = self.experts, self.experts.gpus_per_node
        if self.node is None or self.rail is None or self.node.size != per_node:
            node, place = divmod(experts.rank, per_node)
            inside = self._new_group("node", None, experts.ranks[node * per_node :][:per_node])
            across = self._new_group("rail", None, experts.ranks[place::per_node])
            self.node = Comm(inside, per_node, experts.ledger, part_of=experts)
            self.rail = Comm(across, 1, experts.ledger, part_of=experts)
            self.node.warm()
            self.rail.warm()
        return self.node, self.rail

    @property
    def every(self) -> list[Comm]:
        """Every group over which anything is sent."""
        split = [comm for comm in (self.node, self.rail) if comm is not None]
        return [self.experts, self.side, self.host, *split, *self.copies]

    def _new_group(self, purpose: str, backend: str | None, ranks: Sequence[int] = ()) -> dist.ProcessGroup:
        """A process group for `purpose`. Later runs in this process get the same one: a group costs threads and files.

        Args:
            ranks: of the default group; none: those of the expert-parallel group.
        """
        default = dist.distributed_c10d._get_default_group()
        for made in [made for made in _MADE.values() if made.default is not default]:
            _MADE.pop(made.key)  # of a default group that is gone
        key = (tuple(ranks) or self.experts.ranks, purpose, backend)
        if key not in _MADE:
            wait = timeout_of(self.experts.group)
            group = dist.new_group(list(key[0]), wait, backend, use_local_synchronization=True)
            _MADE[key] = _Made(key, default, group)
        made = _MADE[key]
        made.users += 1
        self._made.append(made)
        return made.group

    def close(self) -> None:
        """Let go of the groups that were made here; those that no other run uses are destroyed."""
        for made in self._made:
            made.users -= 1
            if made.users == 0 and _MADE.pop(made.key, None) is not None:
                dist.destroy_process_group(made.group)
        self._made.clear()

    @property
    def num_ranks(self) -> int:
        return int(np.prod(self.shape))

    def agree(
        self,
        problem: ReLibraError | None,
        facts: dict[str, int],
        device: torch.device,
        what: str,
        own: dict[str, int] | None = None,
        flag: bool = True,
        *,
        of_copies: dict[str, int] | None = None,
    ) -> bool:
        """`Comm.agree` over all ranks: where one of them refuses, all raise. Collective.

        Args:
            own: facts that only the ranks of one expert-parallel group share.
            of_copies: facts that only ranks that own the same experts share.
        Returns: whether every rank's flag is set.
        """
        rounds = [(self.experts, {**(own or {}), **facts})]
        rounds += [(comm, {**facts, **(of_copies or {})}) for comm in self.copies]
        if of_copies and self.copies:
            rounds.append((self.experts, {}))  # ranks that own other experts hear of it, too
        for comm, mine in rounds:
            try:
                flag = bool(comm.agree(problem, mine, device, what, [flag]).all())
            except CommunicationError:
                raise
            except ReLibraError as error:
                problem = error  # the other groups hear of it, too
        if problem is not None:
            raise problem
        return flag

    @contextmanager
    def agreeing(self, device: torch.device, what: str) -> Iterator[None]:
        """Where the block raises a ReLibraError on one rank, all ranks raise at its end. Collective there."""
        problem = None
        try:
            yield
        except ReLibraError as error:
            problem = error
        self.agree(problem, {}, device, what)

    def gather_over_copies(self, array: np.ndarray, device: torch.device) -> np.ndarray:
        """The same-shaped array of every expert-parallel group, stacked."""
        if not self.copies:
            return array[None]
        return self.copies[0].gather_arrays(array, device, "the exchange of the groups' loads")
