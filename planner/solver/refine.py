"""Improve a whole solution: swap kept replicas, plan layers that miss the balance again, leave layers unplanned."""

from dataclasses import replace

import numpy as np

from ..plan import rank_loads
from .kept_swaps import swap_kept
from .problem import (
    Member,
    Problem,
    drop_idle,
    hosts_of,
    layer_seconds,
    of_layers,
    seconds_in_all,
    solve_nothing,
    solve_over,
)
from .solution import Effort, Solution, target_load

_NEARLY = 1.3  # max/mean of layers that may be better left alone
REACHED = 1.001  # max/mean over the balance asked for, at which it counts as reached
_UNEVEN = 0.002  # over 1, mean of max/mean of a layer that other kept replicas may even out
_ONWARD = 2  # times that homes are moved on from where they have moved to
_MISSED = 1.005  # max/mean over the balance asked for, above which a layer is planned again


def swap_kept_where_uneven(problem: Problem, solution: Solution, slack: float) -> None:
    """Swap kept replicas, in place, in layers that stay uneven and fetch none. With a `balance` asked for, every swap
    that helps stays; without, only what makes the layer cheaper."""
    fetched = ((solution.replicas >= 0) & ~solution.kept[:, None]).any((1, 2, 3))
    over = _over(problem, solution)
    uneven = over.max(1) > REACHED if problem.options.balance is not None else over.mean(1) > 1 + _UNEVEN
    uneven = np.flatnonzero(uneven & ~fetched & solution.kept.any((1, 2)))
    if not len(uneven):
        return
    part = of_layers(problem, uneven)
    other = Solution(*(value[uneven] for value in vars(solution).values()))
    before = Solution(*(value.copy() for value in vars(other).values()))
    target = target_load(part.table_LME, problem.cluster.num_ranks, problem.options.balance, slack)
    swap_kept(part.table_LME, other, target)
    if problem.options.balance is None:
        _put(other, layer_seconds(part, before) <= layer_seconds(part, other), before)
    for name, value in vars(other).items():
        getattr(solution, name)[uneven] = value


def insist(problem: Problem, solution: Solution, effort: Effort, first: Member) -> None:
    """Plan layers that miss the balance asked for again, in place.

    They get fewer kept replicas, so that slots are free for fetched ones, and homes move where that is allowed. A layer
    takes a new solution if its worst micro-batch becomes more even, and its mean is no worse than before, or than
    without any change.

    first: the member that `solution` comes from. No member is solved twice for the same layers.
    """
    options, slots = problem.options, problem.cluster.replica_slots
    may_move = options.max_moves != 0 and problem.table_LME.shape[2] % problem.cluster.num_ranks == 0
    tried = {(tuple(range(len(problem.table_LME))), first)}
    still = _over(problem, solve_nothing(problem)).mean(1)
    ways: list[tuple[float, int | None, bool]] = [(float(kept), 0, False) for kept in (slots, slots - 1, 0)]
    if may_move:
        ways += [(kept, options.max_moves, False) for kept, _, _ in ways]
        # Homes that have moved are a better start to move from, where there is no limit.
        ways += [(0.0, None, True)] * _ONWARD if options.max_moves is None else []
    for kept, moves_allowed, onward in ways:
        missed = np.flatnonzero(_over(problem, solution).max(1) > _MISSED)
        if not len(missed):
            return
        used = solution.kept.sum(2)
        elsewhere = used.sum(0) - used[missed].sum(0)
        part = replace(of_layers(problem, missed), rank_replicas=problem.rank_replicas - int(elsewhere.max()))
        member = Member(min(kept, part.rank_replicas / len(missed)), True, moves_allowed)
        if onward:
            part = replace(part, home=solution.home[missed])
        elif (tuple(missed.tolist()), member) in tried:
            continue
        tried.add((tuple(missed.tolist()), member))
        home, kept_replicas = hosts_of(part, member)
        again = drop_idle(solve_over(part, home, kept_replicas, effort), problem.cluster.gpus_per_node)
        before = Solution(*(value[missed] for value in vars(solution).values()))
        over_before, over_again = _over(part, before), _over(part, again)
        gain = over_before.max(1) - over_again.max(1)
        gain[over_again.mean(1) > np.maximum(over_before.mean(1), still[missed])] = 0
        for layer in np.argsort(-gain, kind="stable")[: np.count_nonzero(gain > 0)]:
            now, then = used[missed[layer]], again.kept[layer].sum(1)
            if (used.sum(0) - now + then).max() > problem.rank_replicas:  # layers that stay as they are may hold more
                continue
            used[missed[layer]] = then
            for name, value in vars(again).items():
                getattr(solution, name)[missed[layer]] = value[layer]


def leave_alone(problem: Problem, solution: Solution) -> None:
    """Undo, in place, layers that would be as fast or faster with their experts where they are and no replicas.

    Where weights are small beside what tokens cost, only layers whose experts have moved, or that are nearly balanced
    as they are, can be such.
    """
    table, ranks = problem.table_LME, problem.cluster.num_ranks
    if _weights_are_small(problem):
        empty = np.zeros((*table.shape[:2], ranks, 0), np.int32)
        busiest = rank_loads(table, problem.home, empty, empty).max(2).sum(1)
        moved = (solution.home != problem.home).any(1)
        doubtful = np.flatnonzero(moved | (busiest * ranks < _NEARLY * table.sum((1, 2))))
        part = of_layers(problem, doubtful)
        if len(doubtful):
            some = Solution(*(value[doubtful] for value in vars(solution).values()))
            _undo(part, some)
            for name, value in vars(some).items():
                getattr(solution, name)[doubtful] = value
    else:
        _undo(problem, solution)


def put_cheaper(problem: Problem, solution: Solution, other: Solution) -> None:
    """Put in place what takes least time over all layers: the solution, the other, or of each layer the cheaper."""
    mixed = Solution(*(value.copy() for value in vars(solution).values()))
    _put(mixed, layer_seconds(problem, other) < layer_seconds(problem, solution), other)
    best = min((solution, mixed, other), key=lambda each: seconds_in_all(problem, each))
    _put(solution, np.ones(len(solution.home), np.bool_), best)


def _over(problem: Problem, solution: Solution) -> np.ndarray:
    """float [L, M]: max/mean over the balance asked for."""
    busiest = rank_loads(problem.table_LME, solution.home, solution.replicas, solution.quota).max(2)
    target = target_load(problem.table_LME, problem.cluster.num_ranks, problem.options.balance, 0.0)
    return busiest / np.maximum(target, 1)


def _weights_are_small(problem: Problem) -> bool:
    """Whether a rank's experts take longer for its tokens than one replica's way between nodes."""
    model, device = problem.setting.model, problem.setting.device
    each = problem.table_LME.sum(2).mean() / problem.cluster.num_ranks
    return bool(each * model.step_flops() / device.grouped_flops > 4 * model.copy_bytes / device.slow)


def _undo(problem: Problem, solution: Solution) -> None:
    still = solve_nothing(problem)
    _put(solution, layer_seconds(problem, solution) >= layer_seconds(problem, still), still)


def _put(solution: Solution, where: np.ndarray, other: Solution) -> None:
    """Layers of another solution, in place."""
    for name, value in vars(other).items():
        getattr(solution, name)[where] = value[where]
