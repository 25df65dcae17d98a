"""BatchPlan: where every expert lives for one batch, and what each micro-batch replicates."""

import hashlib
import os
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .cluster import ClusterSpec
from .errors import FormatError, PlanError, ReLibraError, ShapeError
from .files import load_npz, save_npz, scalar
from .loads import total_loads
from .plan_rules import check_quotas, check_structure
from .plots import plot_balance, plot_replicas
from .printing import line_of, table_of
from .transfers import fetch_sources, kept_sources

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT_VERSION = 2
_KEPT = {1: "guests", 2: "kept"}  # format_version -> what the file calls `kept`


@dataclass(frozen=True, eq=False, repr=False)
class BatchPlan:
    """Placement and replication of one batch. Every rule is checked on construction.

    home:     int32 [L, E]        the rank that owns each expert
    replicas: int32 [L, M, R, S]  the expert in each replica slot, -1 where it is empty
    quota:    int32 [L, M, R, S]  the assignments that the slot computes; what no replica takes stays at home
    kept:     bool [L, R, S]      slots whose expert stays for the whole batch, on any node; others are fetched, from
                                  the expert's home or a kept replica on the slot's node
    loads:    the table [L, M, E] or [L, M, R, E] the plan is for; without it quotas are checked against nothing
    """

    home: np.ndarray
    replicas: np.ndarray
    quota: np.ndarray
    kept: np.ndarray
    gpus_per_node: int
    loads_sha256: str = ""
    model: str = ""
    loads: InitVar[np.ndarray | None] = None
    _held: np.ndarray = field(init=False, repr=False)  # int32 [L, R, home_slots], see home_experts

    def __post_init__(self, loads: np.ndarray | None) -> None:
        for name, dtype, kinds in (
            ("home", np.int32, "iu"),
            ("replicas", np.int32, "iu"),
            ("quota", np.int32, "iu"),
            ("kept", np.bool_, "b"),
        ):
            value = np.asarray(getattr(self, name))
            if value.dtype.kind not in kinds:
                raise PlanError(f"{name} is {value.dtype}, but must be {np.dtype(dtype)}")
            if kinds == "iu" and value.size and (value.min() < -1 or value.max() > np.iinfo(np.int32).max):
                raise PlanError(f"{name} holds {value.min()} to {value.max()}, but must be -1 or more and fit 32 bits")
            object.__setattr__(self, name, np.ascontiguousarray(value, dtype))
        object.__setattr__(self, "gpus_per_node", int(self.gpus_per_node))
        check_structure(self.home, self.replicas, self.quota, self.kept, self.gpus_per_node)
        object.__setattr__(self, "_held", held_experts(self.home, self.num_ranks))
        if loads is not None:
            object.__setattr__(self, "loads_sha256", self.check_made_for(loads))

    def check_made_for(self, loads: np.ndarray) -> str:
        """The digest of the loads [L, M, R, E] or [L, M, E] that the plan was made for.

        Raises: PlanError where these are others, or replicas would take more assignments than an expert has.
        """
        table = total_loads(loads)
        self.check_loads(table)
        digest = loads_digest(table)
        if self.loads_sha256 and self.loads_sha256 != digest:
            raise PlanError(
                f"the plan was made for other loads: its loads_sha256 is {self.loads_sha256}, these have {digest}"
            )
        check_quotas(table, self.replicas, self.quota)
        return digest

    def __repr__(self) -> str:
        return line_of("BatchPlan", self._facts())

    def _repr_html_(self) -> str:
        return table_of("BatchPlan", self._facts())

    def plot(self, loads: np.ndarray | None = None, ax: "Axes | None" = None) -> "Axes":
        """What the plan does in each layer; with its loads, max/mean over ranks beside static placement's.

        Args: loads: [L, M, E] or [L, M, R, E]. ax: to draw on; None: a new figure.
        Returns: the axes. Raises: InputError where matplotlib is not installed; ShapeError for loads of another batch.
        """
        home = contiguous_home(self.num_layers, self.num_experts, self.num_ranks)
        if loads is None:
            fetched = (self.replicas >= 0) & ~self.kept[:, None]
            away = (self.home != home).sum(1)
            return plot_replicas(self.kept.sum((1, 2)), fetched.sum((2, 3)).mean(1), away, ax)
        planned = self.rank_loads(loads)
        static = rank_loads(total_loads(loads), home, np.full_like(self.replicas, -1), np.zeros_like(self.quota))
        return plot_balance(max_mean(static), max_mean(planned), ax)

    def _facts(self) -> dict[str, object]:
        kept, fetched = int(self.kept.sum()), int(((self.replicas >= 0) & ~self.kept[:, None]).sum())
        facts = {"layers": self.num_layers, "micro-batches": self.num_micro_batches, "experts": self.num_experts}
        facts |= {"ranks": self.num_ranks, "kept replicas": kept, "fetched replicas": fetched}
        return facts | ({"(model)": self.model} if self.model else {})

    @property
    def num_layers(self) -> int:
        return self.replicas.shape[0]

    @property
    def num_micro_batches(self) -> int:
        return self.replicas.shape[1]

    @property
    def num_ranks(self) -> int:
        return self.replicas.shape[2]

    @property
    def num_slots(self) -> int:
        """S: replica slots a rank."""
        return self.replicas.shape[3]

    @property
    def num_experts(self) -> int:
        return self.home.shape[1]

    @property
    def home_slots(self) -> int:
        """Home slots a rank: E / R, rounded up. Where that is not whole, some ranks leave their last one empty."""
        return self._held.shape[2]

    def home_experts(self, layer: int) -> np.ndarray:
        """int32 [R, home_slots]: the experts that each rank owns, ascending, which is the order of its home slots.

        A rank with one expert fewer than others has -1 in its last slot.
        """
        return self._held[layer]

    def sources(self) -> np.ndarray:
        """int32 [L, M, R, S]: the rank that sends each fetched replica and takes its gradient; -1 for empty and kept
        slots. It is the least busy holder on the slot's node (`transfers.fetch_sources`)."""
        return fetch_sources(self.home, self.replicas, self.kept, self.gpus_per_node)

    def kept_sources(self) -> np.ndarray:
        """int32 [L, R, S]: the rank that sends each kept replica and takes its gradient; -1 where none is kept.

        Weights cross to another node once, to the relay that hands them on (`transfers.kept_sources`). A relay adds the
        gradients that come to it to its own before it sends that home.
        """
        return kept_sources(self.home, self.replicas, self.kept, self.gpus_per_node)

    def has_replicas(self, layer: int, micro_batch: int) -> bool:
        """Whether any replica slot is in use. Where none is, the runtime skips all that it does for replicas."""
        return bool((self.replicas[layer, micro_batch] >= 0).any())

    def rank_loads(self, loads: np.ndarray) -> np.ndarray:
        """int64 [L, M, R]: assignments that each rank computes under the plan."""
        table = total_loads(loads)
        self.check_loads(table)
        return rank_loads(table, self.home, self.replicas, self.quota)

    def imbalance(self, loads: np.ndarray) -> np.ndarray:
        """float [L, M]: max / mean over ranks of their assignments; nan where a micro-batch has none."""
        return max_mean(self.rank_loads(loads))

    def imbalance_mean(self, loads: np.ndarray) -> float:
        """Mean of `imbalance` over the (layer, micro-batch) pairs with load; 1.0 where there is none at all."""
        ratio = self.imbalance(loads)
        return float(np.nanmean(ratio)) if not np.isnan(ratio).all() else 1.0

    def imbalance_worst(self, loads: np.ndarray) -> float:
        """Largest `imbalance`; 1.0 where there is no load at all."""
        ratio = self.imbalance(loads)
        return float(np.nanmax(ratio)) if not np.isnan(ratio).all() else 1.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .npz file without pickles, whole or not at all."""
        save_npz(
            path,
            home=self.home,
            replicas=self.replicas,
            quota=self.quota,
            kept=self.kept,
            format_version=np.asarray(FORMAT_VERSION, np.int64),
            gpus_per_node=np.asarray(self.gpus_per_node, np.int64),
            loads_sha256=np.asarray(self.loads_sha256),
            model=np.asarray(self.model),
        )

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], loads: np.ndarray | None = None, model: str | None = None
    ) -> "BatchPlan":
        """Read a plan and check it again. With `loads` or `model`, a plan for others is refused (PlanError)."""
        name = os.fspath(path)
        arrays = load_npz(
            path,
            ("home", "replicas", "quota", "gpus_per_node", "loads_sha256", "model", "format_version"),
            _KEPT.values(),
        )
        gpus, version = scalar(arrays, "gpus_per_node", path), scalar(arrays, "format_version", path)
        if not isinstance(gpus, np.integer) or not isinstance(version, np.integer):
            raise FormatError(f"{name}: gpus_per_node and format_version must be integers")
        if int(version) not in _KEPT:
            raise PlanError(
                f"{name}: format_version is {version}, but this library reads {' and '.join(map(str, _KEPT))}"
            )
        if _KEPT[int(version)] not in arrays:
            raise FormatError(f"{name}: has no array {_KEPT[int(version)]!r}, only {sorted(arrays)}")
        made_for = str(scalar(arrays, "model", path))
        if model is not None and model != made_for:
            raise PlanError(f"{name}: the plan is for model {made_for!r}, not {model!r}")
        digest = str(scalar(arrays, "loads_sha256", path))
        try:
            return cls(
                home=arrays["home"],
                replicas=arrays["replicas"],
                quota=arrays["quota"],
                kept=arrays[_KEPT[int(version)]],
                gpus_per_node=int(gpus),
                loads_sha256=digest,
                model=made_for,
                loads=loads,
            )
        except ReLibraError as error:
            raise type(error)(f"{name}: {error}") from None

    def micro_batch(self, index: int) -> "BatchPlan":
        """The plan of one micro-batch alone."""
        part = slice(index, index + 1)
        return BatchPlan(
            self.home, self.replicas[:, part], self.quota[:, part], self.kept, self.gpus_per_node, model=self.model
        )

    def check_loads(self, table: np.ndarray) -> None:
        """Refuse a table [L, M, E] of other layers, micro-batches or experts."""
        expected = (self.num_layers, self.num_micro_batches, self.num_experts)
        if table.shape != expected:
            raise ShapeError(
                f"loads has [layers, micro-batches, experts] {table.shape}, but the plan is for {expected}"
            )


def rank_loads(
    table_LME: np.ndarray, home_LE: np.ndarray, replicas_LMRS: np.ndarray, quota_LMRS: np.ndarray
) -> np.ndarray:
    """int64 [L, M, R]: assignments that each rank computes."""
    layers, ranks = len(table_LME), replicas_LMRS.shape[2]
    held = held_experts(home_LE, ranks)
    at_home = np.take_along_axis(table_LME, np.maximum(held, 0).reshape(layers, 1, -1), 2)
    at_home = at_home.reshape(layers, -1, *held.shape[1:]).sum(-1, where=held[:, None] >= 0)
    layer, micro_batch, rank, slot = np.nonzero(quota_LMRS)
    taken = quota_LMRS[layer, micro_batch, rank, slot].astype(np.int64)
    owner = home_LE[layer, replicas_LMRS[layer, micro_batch, rank, slot]]
    np.add.at(at_home, (layer, micro_batch, rank), taken)
    np.subtract.at(at_home, (layer, micro_batch, owner), taken)
    return at_home


def max_mean(loads: np.ndarray) -> np.ndarray:
    """float [...] of loads [..., R]: the busiest rank over the mean; nan where there is no load."""
    mean = loads.mean(-1)
    return np.divide(loads.max(-1), mean, out=np.full(mean.shape, np.nan), where=mean > 0)


def contiguous_home(layers: int, experts: int, ranks: int) -> np.ndarray:
    """int32 [L, E]: experts in order, E / R on every rank, as frameworks lay them out.

    Where E does not divide over R, the first E % R ranks have one more.
    """
    size = experts // ranks + (np.arange(ranks) < experts % ranks)
    return np.tile(np.repeat(np.arange(ranks, dtype=np.int32), size), (layers, 1))


def held_experts(home_LE: np.ndarray, ranks: int) -> np.ndarray:
    """int32 [L, R, most experts of a rank]: the experts whose home each rank is, ascending, then -1."""
    layers, experts = home_LE.shape
    order = np.argsort(home_LE, axis=1, kind="stable").astype(np.int32)
    owned = np.zeros((layers, ranks), np.int64)
    np.add.at(owned, (np.arange(layers)[:, None], home_LE), 1)
    if (owned * ranks == experts).all():
        return order.reshape(layers, ranks, -1)
    out = np.full((layers, ranks, int(owned.max(initial=0))), -1, np.int32)
    rank = np.take_along_axis(home_LE, order, 1)
    first = np.cumsum(owned, 1) - owned
    place = np.arange(experts) - np.take_along_axis(first, rank, 1)
    out[np.arange(layers)[:, None], rank, place] = order
    return out


def loads_digest(loads: np.ndarray) -> str:
    """SHA-256 of the shape and the little-endian int64 table [L, M, E], summed over source ranks."""
    table = total_loads(loads)
    digest = hashlib.sha256(repr(table.shape).encode())
    digest.update(np.ascontiguousarray(table, "<i8").tobytes())
    return digest.hexdigest()


def static_plan(loads: np.ndarray, cluster: ClusterSpec, model: str = "") -> BatchPlan:
    """What training without a planner does: contiguous homes, no replicas."""
    table = total_loads(loads)
    layers, micro_batches, experts = table.shape
    cluster.home_slots(experts)
    slots = (cluster.num_ranks, cluster.replica_slots)
    return BatchPlan(
        home=contiguous_home(layers, experts, cluster.num_ranks),
        replicas=np.full((layers, micro_batches, *slots), -1, np.int32),
        quota=np.zeros((layers, micro_batches, *slots), np.int32),
        kept=np.zeros((layers, *slots), np.bool_),
        gpus_per_node=cluster.gpus_per_node,
        model=model,
        loads=table,
    )
