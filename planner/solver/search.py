"""Which of a small family of plans takes the least time.

Members differ in where homes are (as they are, or moved), in how much is kept (shares of what memory allows), and in
whether copies of an expert are spread over nodes. Each is solved and priced on a fixed sample of layers and
micro-batches; the cheapest is then solved for all. A layer whose plan costs more than no change is left as it is.
"""

from dataclasses import dataclass, replace

import numpy as np

from ..cluster import ClusterSpec
from ..options import PlanOptions
from ..plan import BatchPlan, rank_loads
from ..pricing.cost import Setting, kept_seconds, migration_seconds, seconds_by_pair
from ..pricing.outcome import Outcome, moves, outcome_of_plan
from .kept import Copies, choose_copies, pack, shares
from .placement import WORTH_MOVING, place
from .solution import Effort, Solution, fetch_price, solve, target_load

EFFORTS = {
    "full": Effort(rounds=24, sweeps=4, slack=1 / 1024, within=0.02, again=4, near=0.002, hard=10),
    "fast": Effort(rounds=14, sweeps=0, slack=1 / 256, within=0.0, again=1, near=0.01),
}
_EXACT = 1 << 20  # sweeps: as many as it takes
_LEVELS = (1.5, 1.0, 0.5, 0.25)  # kept replicas a rank and layer that are tried below what memory allows
_SCARCE = 0.5  # kept replicas a rank and layer below which moving homes may pay
_NEARLY = 1.3  # max/mean of layers that may be better left alone
_SAMPLE_LAYERS, _SAMPLE_MICRO_BATCHES = 4, 6
_MISSED = 1.005  # max/mean over the balance asked for, above which a layer is planned again


@dataclass(frozen=True)
class Member:
    """One way to plan. kept: replicas a rank and layer. moves: experts a layer that may move, None without a limit."""

    kept: float
    spread: bool = True
    moves: int | None = 0


@dataclass(frozen=True, eq=False)
class Problem:
    """Layers to plan. wanted_LMNE: see `pricing.outcome.wanted_by_nodes`. home: where experts are. copies: memory of a
    rank for kept replicas over these layers."""

    table_LME: np.ndarray
    wanted_LMNE: np.ndarray
    home: np.ndarray
    copies: int
    cluster: ClusterSpec
    options: PlanOptions
    setting: Setting

    def sample(self) -> "Problem":
        """A few layers and micro-batches of it, evenly spaced."""
        layers = len(self.table_LME)
        chosen = _spaced(layers, _SAMPLE_LAYERS)
        return replace(
            self,
            table_LME=self.table_LME[chosen],
            wanted_LMNE=self.wanted_LMNE[chosen],
            home=self.home[chosen],
            copies=self.copies * len(chosen) // layers,
        )


def plan_layers(problem: Problem) -> Solution:
    """The cheapest solution of the family."""
    effort = EFFORTS[problem.options.effort]
    if problem.options.balance is not None:
        effort = replace(effort, sweeps=_EXACT, slack=0.0, within=None, exits=16)
    members = _members(problem)
    best = members[0]
    if len(members) > 1:
        sample = problem.sample()
        quick = replace(effort, again=min(effort.again, 1), hard=0)
        costs = [_sample_seconds(sample, member, quick) for member in members]
        best = members[int(np.argmin(costs))]
    home, copies = _hosts(problem, best)
    solution = _drop_idle(_solve(problem, home, copies, effort))
    if problem.options.balance is None:
        _leave_alone(problem, solution)
    else:
        _insist(problem, solution, effort, best)
    return solution


def _insist(problem: Problem, solution: Solution, effort: Effort, first: Member) -> None:
    """Plan layers that miss the balance asked for again, in place: with fewer kept replicas, so that slots are free for
    fetched ones, and with homes moved, where that is allowed. Of each layer the most even solution stays.

    first: the member that `solution` comes from. No member is solved twice for the same layers.
    """
    options, slots = problem.options, problem.cluster.replica_slots
    may_move = options.max_moves != 0 and problem.table_LME.shape[2] % problem.cluster.num_ranks == 0
    tried = {(tuple(range(len(problem.table_LME))), first)}
    for moves_allowed in (0, options.max_moves) if may_move else (0,):
        for kept in (float(slots), float(slots - 1), 0.0):
            missed = np.flatnonzero(_over(problem, solution) > _MISSED)
            if not len(missed):
                return
            used = solution.kept.sum(2)
            elsewhere = used.sum(0) - used[missed].sum(0)
            part = replace(
                problem,
                table_LME=problem.table_LME[missed],
                wanted_LMNE=problem.wanted_LMNE[missed],
                home=problem.home[missed],
                copies=problem.copies - int(elsewhere.max()),
            )
            member = Member(min(kept, part.copies / len(missed)), True, moves_allowed)
            if (tuple(missed.tolist()), member) in tried:
                continue
            tried.add((tuple(missed.tolist()), member))
            home, copies = _hosts(part, member)
            again = _drop_idle(_solve(part, home, copies, effort))
            before = Solution(*(value[missed] for value in vars(solution).values()))
            better = _over(part, again) < _over(part, before)
            for name, value in vars(again).items():
                getattr(solution, name)[missed[better]] = value[better]


def _over(problem: Problem, solution: Solution) -> np.ndarray:
    """float [L]: the worst max/mean of a layer's micro-batches, over the balance asked for."""
    busiest = rank_loads(problem.table_LME, solution.home, solution.replicas, solution.quota).max(2)
    target = target_load(problem.table_LME, problem.cluster.num_ranks, problem.options.balance, 0.0)
    return (busiest / np.maximum(target, 1)).max(1)


def _leave_alone(problem: Problem, solution: Solution) -> None:
    """Undo, in place, layers that would be as fast or faster with their experts where they are and no replicas.

    Where weights are small beside what tokens cost, only layers that are nearly balanced as they are can be such.
    """
    table, ranks = problem.table_LME, problem.cluster.num_ranks
    if _weights_are_small(problem):
        empty = np.zeros((*table.shape[:2], ranks, 0), np.int32)
        busiest = rank_loads(table, problem.home, empty, empty).max(2).sum(1)
        doubtful = np.flatnonzero(busiest * ranks < _NEARLY * table.sum((1, 2)))
        part = replace(problem, table_LME=table[doubtful], wanted_LMNE=problem.wanted_LMNE[doubtful])
        part = replace(part, home=problem.home[doubtful])
        if len(doubtful):
            some = Solution(*(value[doubtful] for value in vars(solution).values()))
            _undo(part, some)
            for name, value in vars(some).items():
                getattr(solution, name)[doubtful] = value
    else:
        _undo(problem, solution)


def _weights_are_small(problem: Problem) -> bool:
    """Whether a rank's experts take longer for its tokens than one replica's way between nodes."""
    model, device = problem.setting.model, problem.setting.device
    each = problem.table_LME.sum(2).mean() / problem.cluster.num_ranks
    return bool(each * model.step_flops() / device.grouped_flops > 4 * model.copy_bytes / device.slow)


def _undo(problem: Problem, solution: Solution) -> None:
    still = solve_nothing(problem)
    seconds = []
    for each in (solution, still):
        outcome = replace(outcome_of(each, problem), **moves(each.home, problem.home, problem.cluster.num_ranks))
        moved = np.maximum(outcome.moved_in, outcome.moved_out).max(1)
        once = kept_seconds(outcome, problem.setting)
        once += moved * (problem.setting.model.migration_bytes / problem.setting.device.slow)
        pairs = seconds_by_pair(outcome, problem.setting)
        seconds.append(sum(part.sum(1) for part in pairs.values()) + once)
    worse = np.flatnonzero(seconds[0] >= seconds[1])
    for name, value in vars(still).items():
        getattr(solution, name)[worse] = value[worse]


def solve_nothing(problem: Problem) -> Solution:
    """Experts where they are, and no replicas."""
    layers, micro_batches, _ = problem.table_LME.shape
    slots = problem.cluster.num_ranks, problem.cluster.replica_slots
    empty = np.full((layers, micro_batches, *slots), -1, np.int32)
    return Solution(problem.home.copy(), empty, np.zeros_like(empty), np.zeros((layers, *slots), np.bool_))


def _members(problem: Problem) -> list[Member]:
    """The family, dearest in memory first; of equally good members the first is taken."""
    options, cluster = problem.options, problem.cluster
    layers = len(problem.table_LME)
    most = min(float(cluster.replica_slots), problem.copies / layers)
    levels = [most, *(level for level in _LEVELS if level <= most / 2)][:2] if most > 0 else []
    if options.effort == "fast":
        return [Member(levels[0] if levels else 0.0, moves=0 if levels else options.max_moves)]
    family = [Member(level, spread) for level in levels for spread in ((True, False) if level == most else (True,))]
    if most < 1.5:
        family.append(Member(0.0))
    experts = problem.table_LME.shape[2]
    if most < _SCARCE and options.max_moves != 0 and experts % cluster.num_ranks == 0:
        for moved in (experts // 32, experts // 16, experts // 8, experts // 4, None):
            limit = options.max_moves if moved is None else min(moved, options.max_moves or moved)
            family += [Member(level, True, limit) for level in levels[:1] or (0.0,)]
    return list(dict.fromkeys(family))


def _hosts(problem: Problem, member: Member) -> tuple[np.ndarray, Copies]:
    cluster = problem.cluster
    layers = len(problem.table_LME)
    home = problem.home
    if member.moves != 0:
        home = place(
            problem.table_LME,
            cluster.num_nodes,
            cluster.gpus_per_node,
            previous_home=problem.home,
            max_moves=member.moves,
            polish=member.kept <= 0,
            worth=WORTH_MOVING if member.moves is not None else WORTH_MOVING / 64,
        ).astype(np.int32)
    if member.kept <= 0:
        return home, Copies.none()
    share = shares(problem.table_LME, cluster.num_ranks)
    total = min(int(member.kept * cluster.num_ranks * layers), problem.copies * cluster.num_ranks)
    layer, expert = choose_copies(share, total, cluster.replica_slots * cluster.num_ranks, cluster.num_ranks)
    copies = pack(share, home, layer, expert, cluster, problem.copies, spread=member.spread)
    return home, copies


def _solve(problem: Problem, home: np.ndarray, copies: Copies, effort: Effort) -> Solution:
    cluster, options, setting = problem.cluster, problem.options, problem.setting
    target = target_load(problem.table_LME, cluster.num_ranks, options.balance, effort.slack)
    tokens = problem.table_LME.sum(2).mean() / setting.model.top_k / cluster.num_ranks
    dense = 3 * tokens * setting.model.dense_flops(setting.sequence_length) / setting.device.dense_flops
    fetched = cluster.replica_slots if options.fetched_slots is None else options.fetched_slots
    return solve(
        problem.table_LME,
        problem.wanted_LMNE,
        home,
        copies,
        cluster,
        target,
        effort,
        fetch_price(setting, dense, cluster, options.balance, min(fetched, cluster.replica_slots)),
    )


def _sample_seconds(sample: Problem, member: Member, effort: Effort) -> float:
    """Modelled seconds of the sample under a member; with a balance to reach, those that miss it come last."""
    home, copies = _hosts(sample, member)
    some = _spaced(sample.table_LME.shape[1], _SAMPLE_MICRO_BATCHES)
    part = replace(sample, table_LME=sample.table_LME[:, some], wanted_LMNE=sample.wanted_LMNE[:, some])
    solution = _solve(part, home, copies, effort)
    outcome = outcome_of(solution, part)
    counts = moves(home, sample.home, sample.cluster.num_ranks)
    outcome = replace(outcome, **counts)
    pairs = sum(part.sum() for part in seconds_by_pair(outcome, sample.setting).values())
    once = float(kept_seconds(outcome, sample.setting).sum()) + migration_seconds(outcome, sample.setting)
    seconds = float(pairs) + once * len(some) / sample.table_LME.shape[1]
    if sample.options.balance is not None:
        ratio = outcome.imbalance()
        missed = np.nan_to_num(np.maximum(ratio - sample.options.balance, 0)).mean()
        return float(missed) * 1e6 + seconds
    return seconds


def outcome_of(solution: Solution, problem: Problem) -> Outcome:
    """What a solution costs, moves aside."""
    plan = BatchPlan(solution.home, solution.replicas, solution.quota, solution.kept, problem.cluster.gpus_per_node)
    return outcome_of_plan(plan, problem.table_LME)


def _drop_idle(solution: Solution) -> Solution:
    """Kept replicas that compute nothing in any micro-batch go."""
    idle = solution.kept & (solution.quota.sum(1) == 0)
    solution.kept[idle] = False
    np.copyto(solution.replicas, -1, where=idle[:, None])
    return solution


def _spaced(count: int, most: int) -> np.ndarray:
    return np.arange(min(count, most)) * count // min(count, most)
