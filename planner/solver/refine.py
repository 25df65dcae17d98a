"""Improve a whole solution: swap kept replicas, plan layers that miss the balance again, leave layers unplanned."""

from dataclasses import replace

import numpy as np

from ..plan import rank_loads
from .kept_swaps import swap_kept
from .solution import Effort, Solution, target_load
from .to_plan import (
    LayersToPlan,
    Member,
    drop_idle,
    hosts_of,
    layer_seconds,
    of_layers,
    seconds_in_all,
    solve_nothing,
    solve_over,
)

_NEARLY = 1.3  # max/mean of layers that may be better left alone
REACHED = 1.001  # max/mean over the balance asked for, at which it counts as reached
_UNEVEN = 0.002  # over 1, mean of max/mean of a layer that other kept replicas may even out
_ONWARD = 2  # times that homes are moved on from where they have moved to
_MISSED = 1.005  # max/mean over the balance asked for, above which a layer is planned again


def swap_kept_where_uneven(to_plan: LayersToPlan, solution: Solution, slack: float) -> None:
    """Swap kept replicas, in place, in layers that stay uneven and fetch none. With a `balance` asked for, every swap
    that helps stays; without, only what makes the layer cheaper."""
    fetched = ((solution.replicas >= 0) & ~solution.kept[:, None]).any((1, 2, 3))
    over = _over(to_plan, solution)
    uneven = over.max(1) > REACHED if to_plan.options.balance is not None else over.mean(1) > 1 + _UNEVEN
    uneven = np.flatnonzero(uneven & ~fetched & solution.kept.any((1, 2)))
    if not len(uneven):
        return
    part = of_layers(to_plan, uneven)
    other = Solution(*(value[uneven] for value in vars(solution).values()))
    before = Solution(*(value.copy() for value in vars(other).values()))
    target = target_load(part.table_LME, to_plan.cluster.num_ranks, to_plan.options.balance, slack)
    swap_kept(part.table_LME, other, target)
    if to_plan.options.balance is None:
        _put(other, layer_seconds(part, before) <= layer_seconds(part, other), before)
    for name, value in vars(other).items():
        getattr(solution, name)[uneven] = value


def insist(to_plan: LayersToPlan, solution: Solution, effort: Effort, first: Member) -> None:
    """Plan layers that miss the balance asked for again, in place.

    They get fewer kept replicas, so that slots are free for fetched ones, and homes move where that is allowed. A layer
    takes a new solution if its worst micro-batch becomes more even, and its mean is no worse than before, or than
    without any change.

    first: the member that `solution` comes from. No member is solved twice for the same layers.
    """
    options, slots = to_plan.options, to_plan.cluster.replica_slots
    may_move = options.max_moves != 0 and to_plan.table_LME.shape[2] % to_plan.cluster.num_ranks == 0
    tried = {(tuple(range(len(to_plan.table_LME))), first)}
    still = _over(to_plan, solve_nothing(to_plan)).mean(1)
    ways: list[tuple[float, int | None, bool]] = [(float(kept), 0, False) for kept in (slots, slots - 1, 0)]
    if may_move:
        ways += [(kept, options.max_moves, False) for kept, _, _ in ways]
        # Homes that have moved are a better start to move from, where there is no limit.
        ways += [(0.0, None, True)] * _ONWARD if options.max_moves is None else []
    for kept, moves_allowed, onward in ways:
        missed = np.flatnonzero(_over(to_plan, solution).max(1) > _MISSED)
        if not len(missed):
            return
        used = solution.kept.sum(2)
        elsewhere = used.sum(0) - used[missed].sum(0)
        part = replace(of_layers(to_plan, missed), rank_replicas=to_plan.rank_replicas - int(elsewhere.max()))
        member = Member(min(kept, part.rank_replicas / len(missed)), True, moves_allowed)
        if onward:
            part = replace(part, home=solution.home[missed])
        elif (tuple(missed.tolist()), member) in tried:
            continue
        tried.add((tuple(missed.tolist()), member))
        home, kept_replicas = hosts_of(part, member)
        again = drop_idle(solve_over(part, home, kept_replicas, effort), to_plan.cluster.gpus_per_node)
        before = Solution(*(value[missed] for value in vars(solution).values()))
        over_before, over_again = _over(part, before), _over(part, again)
        gain = over_before.max(1) - over_again.max(1)
        gain[over_again.mean(1) > np.maximum(over_before.mean(1), still[missed])] = 0
        for layer in np.argsort(-gain, kind="stable")[: np.count_nonzero(gain > 0)]:
            now, then = used[missed[layer]], again.kept[layer].sum(1)
            if (used.sum(0) - now + then).max() > to_plan.rank_replicas:  # layers that stay as they are may hold more
                continue
            used[missed[layer]] = then
            for name, value in vars(again).items():
                getattr(solution, name)[missed[layer]] = value[layer]


def leave_alone(to_plan: LayersToPlan, solution: Solution) -> None:
    """Undo, in place, layers that would be as fast or faster with their experts where they are and no replicas.

    Where weights are small beside what tokens cost, only layers whose experts have moved, or that are nearly balanced
    as they are, can be such.
    """
    table, ranks = to_plan.table_LME, to_plan.cluster.num_ranks
    if _weights_are_small(to_plan):
        empty = np.zeros((*table.shape[:2], ranks, 0), np.int32)
        busiest = rank_loads(table, to_plan.home, empty, empty).max(2).sum(1)
        moved = (solution.home != to_plan.home).any(1)
        doubtful = np.flatnonzero(moved | (busiest * ranks < _NEARLY * table.sum((1, 2))))
        part = of_layers(to_plan, doubtful)
        if len(doubtful):
            some = Solution(*(value[doubtful] for value in vars(solution).values()))
            _undo(part, some)
            for name, value in vars(some).items():
                getattr(solution, name)[doubtful] = value
    else:
        _undo(to_plan, solution)


def put_cheaper(to_plan: LayersToPlan, solution: Solution, other: Solution) -> None:
    """Put in place what takes least time over all layers: the solution, the other, or of each layer the cheaper."""
    mixed = Solution(*(value.copy() for value in vars(solution).values()))
    _put(mixed, layer_seconds(to_plan, other) < layer_seconds(to_plan, solution), other)
    best = min((solution, mixed, other), key=lambda each: seconds_in_all(to_plan, each))
    _put(solution, np.ones(len(solution.home), np.bool_), best)


def _over(to_plan: LayersToPlan, solution: Solution) -> np.ndarray:
    """float [L, M]: max/mean over the balance asked for."""
    busiest = rank_loads(to_plan.table_LME, solution.home, solution.replicas, solution.quota).max(2)
    target = target_load(to_plan.table_LME, to_plan.cluster.num_ranks, to_plan.options.balance, 0.0)
    return busiest / np.maximum(target, 1)


def _weights_are_small(to_plan: LayersToPlan) -> bool:
    """Whether a rank's experts take longer for its tokens than one replica's way between nodes."""
    model, device = to_plan.setting.model, to_plan.setting.device
    each = to_plan.table_LME.sum(2).mean() / to_plan.cluster.num_ranks
    return bool(each * model.step_flops() / device.grouped_flops > 4 * model.copy_bytes / device.slow)


def _undo(to_plan: LayersToPlan, solution: Solution) -> None:
    still = solve_nothing(to_plan)
    _put(solution, layer_seconds(to_plan, solution) >= layer_seconds(to_plan, still), still)


def _put(solution: Solution, where: np.ndarray, other: Solution) -> None:
    """Layers of another solution, in place."""
    for name, value in vars(other).items():
        getattr(solution, name)[where] = value[where]
