"""Which of a small family of plans takes the least time.

Members of the family differ in seven things: whether homes move, whether some are swapped between nodes, how many
replicas are kept (shares of what memory allows), whether replicas of an expert are spread over nodes or chosen to level
nodes, how often a home may send kept replicas to other nodes, and how far above its target a rank may stay after
fetching. Each member is solved and priced
on a fixed sample of layers and micro-batches; the cheapest is then solved for all. With full effort and no balance
asked for, every micro-batch then fetches in the cheapest of several ways, and layers in which the sample was wrong take
another member (`_put_others`). A layer whose plan costs more than no change stays as it is.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..pricing.cost import kept_seconds, migration_seconds
from ..pricing.outcome import moves
from .kept import KeptReplicas
from .refine import REACHED, insist, leave_alone, put_cheaper, swap_kept_where_uneven
from .solution import Effort, Solution
from .to_plan import (
    LayersToPlan,
    Member,
    drop_idle,
    hosts_of,
    outcome_of,
    pair_seconds,
    seconds_in_all,
    solve_each,
    solve_over,
    spaced,
)

EFFORTS = {
    "full": Effort(rounds=24, node_rounds=24, sweeps=16, slack=1 / 4096, within=0.1, again=2, few_last=8, near=0.002),
    "fast": Effort(rounds=14, node_rounds=12, sweeps=0, slack=1 / 256, within=0.0),
}
_EXACT = 1 << 20  # sweeps: as many as it takes
_LEVELS = (1.5, 1.0, 0.5, 0.25)  # kept replicas a rank and layer that are tried below what memory allows
_BY_NODE = (0.75, 0.5)  # kept replicas a rank and layer that are tried to level nodes, where memory allows more
_FAR = (4, 3, 2, 1)  # times a home may send its kept replicas of a layer to other nodes
_TOLERANCES = (0.02, 0.05, 0.1, 0.2)  # above the target, that fetched replicas may leave
_UNEVEN = 0.003  # over 1, max/mean of the cheapest member above which others that level nodes are tried
_LOOSER = 0.0005  # part of the time that a tolerance must save
_SCARCE = 0.6  # kept replicas a rank and layer below which moving homes may pay
_SWAPS = 16  # of homes of a layer, tried where few kept replicas level nodes
_MANY = 256  # ranks, from which moving is tried in fewer sizes: finding moves takes longest there
_FEW = 16  # ranks, up to which every way to fetch is tried: it takes no time
_FIRST_LOOK, _SECOND_LOOK = 4, 8  # micro-batches that all members are priced on, and few close to the best again
_SECOND, _CLOSE = 5, 1.015  # how many are close, and how close


def plan_layers(to_plan: LayersToPlan) -> Solution:
    """The cheapest solution of the family."""
    options = to_plan.options
    effort = EFFORTS[options.effort]
    if options.balance is not None:
        effort = replace(effort, sweeps=_EXACT, slack=0.0, within=None, few=16, few_last=16, near=0.0)
    members = _members(to_plan)
    best, second = (members[0], None) if len(members) == 1 else _cheapest(to_plan.sample(), members, effort)
    searched = options.balance is None and options.effort == "full"
    solution = drop_idle(_solve(to_plan, best, effort, singly=searched), to_plan.cluster.gpus_per_node)
    if searched and second is not None:
        other = drop_idle(_solve(to_plan, second, effort, singly=True), to_plan.cluster.gpus_per_node)
        if seconds_in_all(to_plan, other) < seconds_in_all(to_plan, solution):
            best, solution = second, other
    if options.balance is None:
        if searched:
            swap_kept_where_uneven(to_plan, solution, effort.slack)
            _put_others(to_plan, solution, members, best, effort)
        leave_alone(to_plan, solution)
    else:
        swap_kept_where_uneven(to_plan, solution, 0.0)
        insist(to_plan, solution, effort, best)
    return solution


def _put_others(to_plan: LayersToPlan, solution: Solution, members: list[Member], best: Member, effort: Effort) -> None:
    """Replace, in place, layers for which the sample misled: those that another member makes cheaper.

    Only members that fit the memory in every layer are tried: those that keep nothing, and on one node that which keeps
    a replica in every slot, where memory allows that.
    """
    one = to_plan.cluster.num_nodes == 1
    if (best.kept >= _SCARCE and not one) or to_plan.cluster.num_ranks >= _MANY:
        return
    moved = sorted({member.moves for member in members if not member.kept} & {0, None}, key=str)
    others = [Member(0.0, moves=each, tolerance=best.tolerance) for each in moved]
    slots = to_plan.cluster.replica_slots
    if one and 0 < slots <= to_plan.rank_replicas // len(to_plan.table_LME):
        others.append(Member(float(slots)))
    for other in others:
        if other != best:
            found = drop_idle(_solve(to_plan, other, effort, singly=one), to_plan.cluster.gpus_per_node)
            swap_kept_where_uneven(to_plan, found, effort.slack)
            put_cheaper(to_plan, solution, found)


def _solve(to_plan: LayersToPlan, member: Member, effort: Effort, *, singly: bool) -> Solution:
    """Solve all layers as `member` does. singly: every micro-batch fetches in the way that is cheapest for it."""
    home, kept_replicas = hosts_of(to_plan, member)
    solution = solve_over(to_plan, home, kept_replicas, effort, member.tolerance)
    if singly and (member.tolerance or not member.kept or to_plan.cluster.num_nodes == 1):
        plain = replace(effort, sweeps=0)  # fetch once, without exact splits
        ways = [(plain, 0.0, to_plan.cluster.num_nodes == 1)]
        if member.tolerance or to_plan.cluster.num_ranks <= _FEW:
            ways += [(plain, 0.0, False), (plain, 0.0, True), (plain, _TOLERANCES[1], True)]
            ways.append((replace(effort, near=0.0, slack=0.0), 0.0, False))
        if member.tolerance:
            ways += [(effort, each, False) for each in (0.0, *_TOLERANCES) if each != member.tolerance]
        _fetch_singly(to_plan, solution, home, kept_replicas, list(dict.fromkeys(ways)))
    return solution


def _cheapest(sample: LayersToPlan, members: list[Member], effort: Effort) -> tuple[Member, Member | None]:
    """The cheapest member, and the cheapest of those that choose kept replicas or move homes in another way, if there
    are such: a few layers have so few replicas that the sample may not tell which way is better."""
    quick = replace(effort, again=min(effort.again, 1), few_last=0)
    hosts = {member: hosts_of(sample, member) for member in members}

    def look(some: list[Member], micro_batches: int) -> dict[Member, _Look]:
        for member in some:
            hosts[member] = hosts.get(replace(member, tolerance=0.0)) or hosts_of(sample, member)
        return dict(
            zip(some, _look(sample, [hosts[member] for member in some], some, quick, micro_batches), strict=True)
        )

    def seconds(looks: dict[Member, _Look]) -> Callable[[Member], float]:
        return lambda member: looks[member].seconds

    first = look(members, _FIRST_LOOK)
    if first[min(first, key=seconds(first))].imbalance > 1 + _UNEVEN and (more := _levelling_nodes(sample, members)):
        first |= look(more, _FIRST_LOOK)
    alike: dict[_Look, Member] = {}  # a limit that changes nothing makes no other plan
    for member in sorted(first, key=seconds(first)):
        alike.setdefault(first[member], member)
    least = min(first.values()).seconds
    close = [member for found, member in alike.items() if found.seconds <= least * _CLOSE][:_SECOND]
    again = look(close, _SECOND_LOOK)
    best = min(close, key=seconds(again))
    if sample.options.balance is not None:
        return best, None
    # What stays may win where fetched replicas leave something over, though with full balance moves are cheaper.
    stays = min((member for member in first if member.moves == 0), key=seconds(first))
    looser = [replace(member, tolerance=each) for member in dict.fromkeys((best, stays)) for each in _TOLERANCES]
    least = first[best].seconds * (1 - _LOOSER)
    for member, found in look(looser, _FIRST_LOOK).items():
        if found.seconds < least:
            best, least = member, found.seconds
    way = (best.by_node, best.moves == 0)
    others = [member for member in first if member.kept and (member.by_node, member.moves == 0) != way]
    doubtful = best.by_node or (members[0].kept < _SCARCE and any(member.by_node for member in first))
    if not doubtful or not others:
        return best, None
    return best, replace(min(others, key=seconds(first | again)), tolerance=best.tolerance)


def _fetch_singly(
    to_plan: LayersToPlan,
    solution: Solution,
    home: np.ndarray,
    kept_replicas: KeptReplicas,
    ways: list[tuple[Effort, float, bool]],
) -> None:
    """The cheapest way to fetch for every single micro-batch, in place: effort, tolerance, `hottest`."""
    seconds = pair_seconds(to_plan, outcome_of(solution, to_plan))
    for how, tolerance, hottest in ways:
        other = solve_over(to_plan, home, kept_replicas, how, tolerance, hottest=hottest)
        of_other = pair_seconds(to_plan, outcome_of(other, to_plan))
        cheaper = of_other < seconds
        seconds[cheaper] = of_other[cheaper]
        solution.replicas[cheaper], solution.quota[cheaper] = other.replicas[cheaper], other.quota[cheaper]


def _members(to_plan: LayersToPlan) -> list[Member]:
    """The family, dearest in memory first; of equally good members the first is taken."""
    options, cluster = to_plan.options, to_plan.cluster
    layers = len(to_plan.table_LME)
    most = min(float(cluster.replica_slots), to_plan.rank_replicas / layers)
    levels = [most, *(level for level in _LEVELS if level <= most / 2)][:2] if most > 0 else []
    experts = to_plan.table_LME.shape[2]
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
        if may_move:
            swaps = _SWAPS if options.max_moves is None else min(_SWAPS, options.max_moves // 2)
            family += [Member(most, moves=each, by_node=True, swaps=swaps) for each in (0, options.max_moves)]
    return list(dict.fromkeys(family))


def _levelling_nodes(sample: LayersToPlan, members: list[Member]) -> list[Member]:
    """Members that keep fewer replicas than memory allows, but those that level nodes, and fetch the more: where hot
    experts change from one micro-batch to the next, ranks need their slots for that."""
    cluster, most = sample.cluster, members[0].kept
    if cluster.num_nodes == 1 or cluster.replica_slots == 1 or sample.options.fetched_slots == 0 or most < _SCARCE:
        return []
    return [Member(level, by_node=True) for level in _BY_NODE if level <= most]


class _Look(NamedTuple):
    """What a member comes to by the sample: modelled seconds of its layers, and mean of max/mean over ranks."""

    seconds: float
    imbalance: float


def _look(
    sample: LayersToPlan,
    hosts: list[tuple[np.ndarray, KeptReplicas]],
    members: list[Member],
    effort: Effort,
    micro_batches: int,
) -> list[_Look]:
    """Members with these hosts. With a balance to reach, those that miss it come last."""
    some = spaced(sample.table_LME.shape[1], micro_batches)
    part = replace(sample, table_LME=sample.table_LME[:, some], wanted_LMNE=sample.wanted_LMNE[:, some])
    share = len(some) / sample.table_LME.shape[1]
    found = []
    for solution in solve_each(part, hosts, effort, [member.tolerance for member in members]):
        outcome = outcome_of(solution, part)
        outcome = replace(outcome, **moves(solution.home, part.home, part.cluster.num_ranks))
        once = float(kept_seconds(outcome, part.setting).sum()) + migration_seconds(outcome, part.setting)
        seconds = float(pair_seconds(part, outcome).sum()) / share + once
        ratio = np.nan_to_num(outcome.imbalance(), nan=1.0)
        if part.options.balance is not None:
            seconds += float(np.maximum(ratio - part.options.balance * REACHED, 0).mean()) * 1e6
        found.append(_Look(seconds, float(ratio.mean())))
    return found
