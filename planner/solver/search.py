"""Which of a small family of plans takes the least time.

Members of the family differ in seven things: whether homes move, whether some are swapped between nodes, how many
replicas are kept (shares of what memory allows), whether replicas of an expert are spread over nodes or chosen to level
nodes, how often a home may send kept replicas to other nodes, and how far above its target a rank may stay after
fetching. Each member is solved and priced
on a fixed sample of layers and micro-batches; the cheapest is then solved for all. With full effort and no balance
asked for, every micro-batch then fetches in the cheapest of several ways, and layers in which the sample was wrong take
another member (`_put_others`). A layer whose plan costs more than no change stays as it is.
"""

from dataclasses import replace

import numpy as np

from ..pricing.cost import kept_seconds, migration_seconds
from ..pricing.outcome import moves
from .kept import KeptReplicas
from .problem import (
    Member,
    Problem,
    drop_idle,
    hosts_of,
    outcome_of,
    pair_seconds,
    seconds_in_all,
    solve_over,
    spaced,
)
from .refine import REACHED, insist, leave_alone, put_cheaper, swap_kept_where_uneven
from .solution import Effort, Solution

EFFORTS = {
    "full": Effort(rounds=24, node_rounds=24, sweeps=16, slack=1 / 4096, within=0.1, again=2, few_last=8, near=0.002),
    "fast": Effort(rounds=14, node_rounds=12, sweeps=0, slack=1 / 256, within=0.0),
}
_EXACT = 1 << 20  # sweeps: as many as it takes
_LEVELS = (1.5, 1.0, 0.5, 0.25)  # kept replicas a rank and layer that are tried below what memory allows
_FAR = (4, 3, 2, 1)  # times a home may send its kept replicas of a layer to other nodes
_TOLERANCES = (0.02, 0.05, 0.1, 0.2)  # above the target, that fetched replicas may leave
_LOOSER = 0.0005  # part of the time that a tolerance must save
_SCARCE = 0.6  # kept replicas a rank and layer below which moving homes may pay
_SWAPS = 4  # of homes of a layer, tried where few kept replicas level nodes
_MANY = 256  # ranks, from which moving is tried in fewer sizes: finding moves takes longest there
_FEW = 16  # ranks, up to which every way to fetch is tried: it takes no time
_FIRST_LOOK, _SECOND_LOOK = 4, 8  # micro-batches that all members are priced on, and three close to the best again
_CLOSE = 1.015


def plan_layers(problem: Problem) -> Solution:
    """The cheapest solution of the family."""
    options = problem.options
    effort = EFFORTS[options.effort]
    if options.balance is not None:
        effort = replace(effort, sweeps=_EXACT, slack=0.0, within=None, few=16, few_last=16, near=0.0)
    members = _members(problem)
    best, second = (members[0], None) if len(members) == 1 else _cheapest(problem.sample(), members, effort)
    searched = options.balance is None and options.effort == "full"
    solution = drop_idle(_solve(problem, best, effort, singly=searched), problem.cluster.gpus_per_node)
    if searched and second is not None:
        other = drop_idle(_solve(problem, second, effort, singly=True), problem.cluster.gpus_per_node)
        if seconds_in_all(problem, other) < seconds_in_all(problem, solution):
            best, solution = second, other
    if options.balance is None:
        if searched:
            swap_kept_where_uneven(problem, solution, effort.slack)
            _put_others(problem, solution, members, best, effort)
        leave_alone(problem, solution)
    else:
        swap_kept_where_uneven(problem, solution, 0.0)
        insist(problem, solution, effort, best)
    return solution


def _put_others(problem: Problem, solution: Solution, members: list[Member], best: Member, effort: Effort) -> None:
    """Replace, in place, layers for which the sample misled: those that another member makes cheaper.

    Only members that fit the memory in every layer are tried: those that keep nothing, and on one node that which keeps
    a replica in every slot, where memory allows that.
    """
    one = problem.cluster.num_nodes == 1
    if (best.kept >= _SCARCE and not one) or problem.cluster.num_ranks >= _MANY:
        return
    moved = sorted({member.moves for member in members if not member.kept} & {0, None}, key=str)
    others = [Member(0.0, moves=each, tolerance=best.tolerance) for each in moved]
    slots = problem.cluster.replica_slots
    if one and 0 < slots <= problem.rank_replicas // len(problem.table_LME):
        others.append(Member(float(slots)))
    for other in others:
        if other != best:
            found = drop_idle(_solve(problem, other, effort, singly=one), problem.cluster.gpus_per_node)
            swap_kept_where_uneven(problem, found, effort.slack)
            put_cheaper(problem, solution, found)


def _solve(problem: Problem, member: Member, effort: Effort, *, singly: bool) -> Solution:
    """Solve all layers as `member` does. singly: every micro-batch fetches in the way that is cheapest for it."""
    home, kept_replicas = hosts_of(problem, member)
    solution = solve_over(problem, home, kept_replicas, effort, member.tolerance)
    if singly and (member.tolerance or not member.kept or problem.cluster.num_nodes == 1):
        plain = replace(effort, sweeps=0)  # fetch once, without exact splits
        ways = [(plain, 0.0, problem.cluster.num_nodes == 1)]
        if member.tolerance or problem.cluster.num_ranks <= _FEW:
            ways += [(plain, 0.0, False), (plain, 0.0, True), (plain, _TOLERANCES[1], True)]
            ways.append((replace(effort, near=0.0), 0.0, False))
        if member.tolerance:
            ways += [(effort, each, False) for each in (0.0, *_TOLERANCES) if each != member.tolerance]
        _fetch_singly(problem, solution, home, kept_replicas, list(dict.fromkeys(ways)))
    return solution


def _cheapest(sample: Problem, members: list[Member], effort: Effort) -> tuple[Member, Member | None]:
    """The cheapest member, and the cheapest of those that choose kept replicas in the other way, if there are such: a
    few layers have so few of them that the sample may not tell which way is better."""
    quick = replace(effort, again=min(effort.again, 1), few_last=0)
    hosts = {member: hosts_of(sample, member) for member in members}

    def seconds(member: Member, micro_batches: int) -> float:
        return _sample_seconds(sample, hosts[replace(member, tolerance=0.0)], member.tolerance, quick, micro_batches)

    costs = {member: seconds(member, _FIRST_LOOK) for member in members}
    close = [
        member for member in sorted(costs, key=costs.__getitem__)[:3] if costs[member] <= min(costs.values()) * _CLOSE
    ]
    best = min(close, key=lambda member: seconds(member, _SECOND_LOOK))
    if sample.options.balance is not None:
        return best, None
    # What stays may win where fetched replicas leave something over, though with full balance moves are cheaper.
    stays = min((member for member in costs if member.moves == 0), key=costs.__getitem__)
    least = costs[best] * (1 - _LOOSER)
    for member in dict.fromkeys((best, stays)):
        for tolerance in _TOLERANCES:
            looser = replace(member, tolerance=tolerance)
            cost = seconds(looser, _FIRST_LOOK)
            if cost < least:
                best, least = looser, cost
    others = [member for member in costs if member.by_node != best.by_node and member.kept]
    if not any(member.by_node for member in costs) or not others:
        return best, None
    return best, replace(min(others, key=costs.__getitem__), tolerance=best.tolerance)


def _fetch_singly(
    problem: Problem,
    solution: Solution,
    home: np.ndarray,
    kept_replicas: KeptReplicas,
    ways: list[tuple[Effort, float, bool]],
) -> None:
    """The cheapest way to fetch for every single micro-batch, in place: effort, tolerance, `hottest`."""
    seconds = pair_seconds(problem, outcome_of(solution, problem))
    for how, tolerance, hottest in ways:
        other = solve_over(problem, home, kept_replicas, how, tolerance, hottest=hottest)
        of_other = pair_seconds(problem, outcome_of(other, problem))
        cheaper = of_other < seconds
        seconds[cheaper] = of_other[cheaper]
        solution.replicas[cheaper], solution.quota[cheaper] = other.replicas[cheaper], other.quota[cheaper]


def _members(problem: Problem) -> list[Member]:
    """The family, dearest in memory first; of equally good members the first is taken."""
    options, cluster = problem.options, problem.cluster
    layers = len(problem.table_LME)
    most = min(float(cluster.replica_slots), problem.rank_replicas / layers)
    levels = [most, *(level for level in _LEVELS if level <= most / 2)][:2] if most > 0 else []
    experts = problem.table_LME.shape[2]
    small = cluster.num_nodes == 1 and cluster.num_ranks <= _FEW  # moves inside a node are cheap, and soon found
    may_move = (most < _SCARCE or small) and options.max_moves != 0
    may_move = may_move and experts % cluster.num_ranks == 0  # a swap keeps homes even
    if options.effort == "fast":
        return [Member(levels[0] if levels else 0.0, moves=options.max_moves if may_move and not levels else 0)]
    family = [Member(level, spread) for level in levels for spread in ((True, False) if level == most else (True,))]
    if cluster.num_nodes > 1:
        family += [Member(level, far=far) for level in levels for far in (_FAR if level == most else _FAR[2:3])]
    if most < 1.5 or cluster.num_nodes == 1:
        family.append(Member(0.0))
    if may_move:
        parts = (32, 16, 8, 4) if cluster.num_ranks < _MANY else (8,)
        for moved in (*(experts // part for part in parts), None):
            limit = options.max_moves if moved is None else min(moved, options.max_moves or moved)
            family += [Member(level, True, limit) for level in levels[:1] or (0.0,)]
    if cluster.num_nodes > 1 and 0 < most < _SCARCE:
        family.append(Member(most, by_node=True))
        if may_move and options.max_moves is None:
            family += [Member(most, moves=each, by_node=True, swaps=_SWAPS) for each in (0, None)]
        elif may_move and options.max_moves is not None:
            family.append(Member(most, by_node=True, swaps=min(_SWAPS, options.max_moves // 2)))
            family.append(Member(most, moves=options.max_moves, by_node=True))
    return list(dict.fromkeys(family))


def _sample_seconds(
    sample: Problem, hosts: tuple[np.ndarray, KeptReplicas], tolerance: float, effort: Effort, micro_batches: int
) -> float:
    """Modelled seconds of the sample over these hosts; with a balance to reach, those that miss it come last."""
    home, kept_replicas = hosts
    some = spaced(sample.table_LME.shape[1], micro_batches)
    part = replace(sample, table_LME=sample.table_LME[:, some], wanted_LMNE=sample.wanted_LMNE[:, some])
    solution = solve_over(part, home, kept_replicas, effort, tolerance)
    outcome = outcome_of(solution, part)
    counts = moves(home, sample.home, sample.cluster.num_ranks)
    outcome = replace(outcome, **counts)
    pairs = pair_seconds(part, outcome).sum()
    once = float(kept_seconds(outcome, sample.setting).sum()) + migration_seconds(outcome, sample.setting)
    seconds = float(pairs) + once * len(some) / sample.table_LME.shape[1]
    if sample.options.balance is not None:
        ratio = outcome.imbalance()
        missed = np.nan_to_num(np.maximum(ratio - sample.options.balance * REACHED, 0)).mean()
        return float(missed) * 1e6 + seconds
    return seconds
