"""What is to be planned: layers and options; the homes and kept replicas that each way to plan gives; prices."""

from dataclasses import dataclass, replace

import numpy as np

from ..cluster import ClusterSpec
from ..options import PlanOptions
from ..plan import BatchPlan
from ..pricing.cost import Setting, exchange, kept_seconds, migration_seconds, move_seconds, seconds_by_pair
from ..pricing.outcome import Outcome, moves, outcome_of_plan
from .kept import KeptReplicas, NodeRule, choose_replicas, pack, shares
from .kept_by_node import choose_by_node
from .placement import WORTH_MOVING, place
from .solution import Effort, Solution, fetch_price, solve, target_load

_SAMPLE_LAYERS = 6  # that members of the family are priced on


@dataclass(frozen=True)
class Member:
    """One way to plan; the family of `search.py` differs in these.

    Attributes:
        kept: kept replicas a rank and layer, in the mean.
        spread: replicas of one expert lie on different nodes.
        moves: experts of a layer whose home may change; None is without a limit.
        far: how often a home may send kept replicas of one layer to other nodes; None is without a limit.
        tolerance: as in `FetchPrice`.
        by_node: kept replicas are chosen to level nodes (`kept_by_node.py`). swaps: of homes of a layer that are tried
            then.
    """

    kept: float
    spread: bool = True
    moves: int | None = 0
    far: int | None = None
    tolerance: float = 0.0
    by_node: bool = False
    swaps: int = 0


@dataclass(frozen=True, eq=False)
class LayersToPlan:
    """Layers to plan, and for what.

    Attributes:
        table_LME: int64 [L, M, E], assignments of every expert.
        wanted_LMNE: [L, M, nodes, E], those that each node asks for (`pricing.outcome.wanted_by_nodes`).
        home: int32 [L, E], the rank that each expert is on now.
        rank_replicas: kept replicas for which a rank has memory, over all these layers together.
    """

    table_LME: np.ndarray
    wanted_LMNE: np.ndarray
    home: np.ndarray
    rank_replicas: int
    cluster: ClusterSpec
    options: PlanOptions
    setting: Setting

    def sample(self) -> "LayersToPlan":
        """A few layers and micro-batches of it, evenly spaced."""
        layers = len(self.table_LME)
        chosen = spaced(layers, _SAMPLE_LAYERS)
        return replace(
            self,
            table_LME=self.table_LME[chosen],
            wanted_LMNE=self.wanted_LMNE[chosen],
            home=self.home[chosen],
            rank_replicas=-(-self.rank_replicas * len(chosen) // layers),  # few of many layers are not none of a few
        )


def of_layers(to_plan: LayersToPlan, layers: np.ndarray) -> LayersToPlan:
    """Some layers of it, with the memory of all."""
    return replace(
        to_plan,
        table_LME=to_plan.table_LME[layers],
        wanted_LMNE=to_plan.wanted_LMNE[layers],
        home=to_plan.home[layers],
    )


def hosts_of(to_plan: LayersToPlan, member: Member) -> tuple[np.ndarray, KeptReplicas]:
    cluster = to_plan.cluster
    layers = len(to_plan.table_LME)
    home = to_plan.home.copy()  # a solution is changed in place
    if member.moves != 0:
        home = place(
            to_plan.table_LME,
            cluster.num_nodes,
            cluster.gpus_per_node,
            previous_home=to_plan.home,
            max_moves=member.moves,
            polish=member.kept <= 0,
            worth=WORTH_MOVING if member.moves is not None else WORTH_MOVING / 64,
        ).astype(np.int32)
    if member.kept <= 0:
        return home, KeptReplicas.none()
    share = shares(to_plan.table_LME, cluster.num_ranks)
    total = min(int(member.kept * cluster.num_ranks * layers), to_plan.rank_replicas * cluster.num_ranks)
    if member.by_node:
        # A rank takes its part of the node's load by fetching, which needs a slot.
        fetches = cluster.replica_slots > 1 and to_plan.options.fetched_slots != 0
        slots = replace(cluster, replica_slots=cluster.replica_slots - fetches)
        return choose_by_node(to_plan.table_LME, home, total, slots, to_plan.rank_replicas, member.swaps)
    layer, expert = choose_replicas(share, total, cluster.replica_slots * cluster.num_ranks, cluster.num_ranks)
    kept_replicas = pack(
        share, home, layer, expert, cluster, to_plan.rank_replicas, NodeRule(member.spread, member.far)
    )
    return home, kept_replicas


def solve_over(
    to_plan: LayersToPlan,
    home: np.ndarray,
    kept_replicas: KeptReplicas,
    effort: Effort,
    tolerance: float | np.ndarray = 0.0,
    *,
    hottest: bool = False,
) -> Solution:
    """The loads split over these hosts, and what pays fetched. tolerance (of all layers, or of each), hottest: see
    `FetchPrice`."""
    cluster, options, setting = to_plan.cluster, to_plan.options, to_plan.setting
    target = target_load(to_plan.table_LME, cluster.num_ranks, options.balance, effort.slack)
    tokens = to_plan.table_LME.sum(2).mean() / setting.model.top_k / cluster.num_ranks
    dense = 3 * tokens * setting.model.dense_flops(setting.sequence_length) / setting.device.dense_flops
    fetched = cluster.replica_slots if options.fetched_slots is None else options.fetched_slots
    return solve(
        to_plan.table_LME,
        to_plan.wanted_LMNE,
        home,
        kept_replicas,
        cluster,
        target,
        effort,
        fetch_price(setting, dense, cluster, options.balance, min(fetched, cluster.replica_slots), tolerance, hottest),
    )


def solve_each(
    to_plan: LayersToPlan, hosts: list[tuple[np.ndarray, KeptReplicas]], effort: Effort, tolerances: list[float]
) -> list[Solution]:
    """A solution for each of several choices of hosts, all at once, as more layers."""
    count, layers = len(hosts), len(to_plan.table_LME)
    all_layers = of_layers(to_plan, np.tile(np.arange(layers), count))
    kept = [
        (replicas.layer + turn * layers, replicas.expert, replicas.rank) for turn, (_, replicas) in enumerate(hosts)
    ]
    home = np.concatenate([home for home, _ in hosts])
    replicas = KeptReplicas(*(np.concatenate(parts) for parts in zip(*kept, strict=True)))
    solution = solve_over(all_layers, home, replicas, effort, np.repeat(tolerances, layers))
    parts = (slice(turn * layers, (turn + 1) * layers) for turn in range(count))
    return [Solution(*(value[part] for value in vars(solution).values())) for part in parts]


def solve_nothing(to_plan: LayersToPlan) -> Solution:
    """Experts where they are, and no replicas."""
    layers, micro_batches, _ = to_plan.table_LME.shape
    slots = to_plan.cluster.num_ranks, to_plan.cluster.replica_slots
    empty = np.full((layers, micro_batches, *slots), -1, np.int32)
    return Solution(to_plan.home.copy(), empty, np.zeros_like(empty), np.zeros((layers, *slots), np.bool_))


def drop_idle(solution: Solution, gpus_per_node: int) -> Solution:
    """Kept replicas that compute nothing in any micro-batch go, but for those that fetched ones may come from."""
    idle = solution.kept & (solution.quota.sum(1) == 0)
    layer, _, rank, slot = at = np.nonzero((solution.replicas >= 0) & ~solution.kept[:, None])
    ranks, experts = solution.kept.shape[1], solution.home.shape[1]
    node = np.arange(ranks) // gpus_per_node
    sought = np.zeros((len(idle), ranks // gpus_per_node, experts), np.bool_)
    sought[layer, node[rank], solution.replicas[at]] = True
    layer, rank, slot = np.nonzero(idle)
    idle[layer, rank, slot] = ~sought[layer, node[rank], solution.replicas[layer, 0, rank, slot]]
    solution.kept[idle] = False
    np.copyto(solution.replicas, -1, where=idle[:, None])
    return solution


def outcome_of(solution: Solution, to_plan: LayersToPlan) -> Outcome:
    """What a solution costs, moves aside."""
    plan = BatchPlan(solution.home, solution.replicas, solution.quota, solution.kept, to_plan.cluster.gpus_per_node)
    return outcome_of_plan(plan, to_plan.table_LME)


def pair_seconds(to_plan: LayersToPlan, outcome: Outcome) -> np.ndarray:
    """float [L, M]: modelled seconds of every micro-batch.

    Where the table does not say on which rank the tokens are, half of the time that staying on their node would save is
    counted.
    """
    parts = seconds_by_pair(outcome, to_plan.setting)
    if to_plan.wanted_LMNE.shape[2] == 1:
        anywhere = exchange(replace(outcome, local=None), to_plan.setting).seconds
        parts["exchange"] = (parts["exchange"] + anywhere) / 2
    return np.sum(list(parts.values()), axis=0)


def layer_seconds(to_plan: LayersToPlan, solution: Solution) -> np.ndarray:
    """float [L]: modelled seconds, moves of homes included."""
    outcome = outcome_of(solution, to_plan)
    outcome = replace(outcome, **moves(solution.home, to_plan.home, to_plan.cluster.num_ranks))
    moved = np.maximum(outcome.moved_in, outcome.moved_out).max(1)
    once = kept_seconds(outcome, to_plan.setting)
    once += moved * move_seconds(to_plan.setting, to_plan.cluster.num_ranks)
    return np.sum(list(seconds_by_pair(outcome, to_plan.setting).values()), axis=0).sum(1) + once


def seconds_in_all(to_plan: LayersToPlan, solution: Solution) -> float:
    """Modelled seconds of all layers. Moves take what the rank takes that moves most over all of them."""
    outcome = outcome_of(solution, to_plan)
    outcome = replace(outcome, **moves(solution.home, to_plan.home, to_plan.cluster.num_ranks))
    once = float(kept_seconds(outcome, to_plan.setting).sum()) + migration_seconds(outcome, to_plan.setting)
    return float(pair_seconds(to_plan, outcome).sum()) + once


def spaced(count: int, most: int) -> np.ndarray:
    return np.arange(min(count, most)) * count // min(count, most)
