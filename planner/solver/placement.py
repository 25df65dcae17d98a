"""Inter-batch reordering: which rank owns each expert for the whole batch.

Nodes first, then the ranks inside each node, by the same two steps for all layers at once. Loads over micro-batches are
vectors: experts that are hot in the same micro-batches must not share a node.

A bin is a node, or a rank of one node.

* `assign`: hottest expert first, to the bin with room whose load overlaps least with it (longest processing time).
* `improve`: pairwise swaps. First those that lower the sum of squares of bin loads. It is a sum over bins, so disjoint
  pairs of bins swap at once. With `polish`, then those that lower the load of the busiest bin, summed over
  micro-batches. Plans with kept replicas go without: their replicas must take what *every* node has above its share,
  and a placement for the busiest node alone makes that about a sixth more.

With a placement to start from, swaps start there, and each must gain enough for the experts that it moves. In the end
every group of experts gets the rank on which most of it is already.

All arithmetic is on integers that float64 holds exactly, so the order of summation, and with it the number of threads,
cannot change the outcome.
"""

import numpy as np

from .matching import match_labels

_BITS = 15  # loads are scaled to this many bits here: products summed over experts and micro-batches stay exact
_SWEEPS = 12  # over all pairs of bins, at most: swaps have run out by then
WORTH_MOVING = 1 / 64  # a swap away from the previous placement must lower the sum of squared excess by this part


def place(
    table_LME: np.ndarray,
    num_nodes: int,
    gpus_per_node: int,
    *,
    previous_home: np.ndarray | None = None,
    max_moves: int | None = None,
    polish: bool = False,
    worth: float = WORTH_MOVING,
) -> np.ndarray:
    """int32 [L, E]: the home rank of every expert. E must divide over the ranks.

    previous_home: [L, E], what to start from
    max_moves:     at most this many experts of a layer leave the rank of `previous_home`
    polish:        also lower the busiest node, for plans that keep nothing
    worth:         a swap away from `previous_home` must lower the sum of squared excess by this part
    """
    layers, micro_batches, experts = table_LME.shape
    weight = _scaled(table_LME)  # [L, E, M]
    if previous_home is None:
        node_members = improve(weight, assign(weight, num_nodes), polish=polish)  # [L, N, E/N]
    else:
        start = np.argsort(previous_home, axis=1, kind="stable").reshape(layers, num_nodes, -1)
        # A swap moves two experts. Half of the swaps, rounded up, may be between nodes.
        swaps = None if max_moves is None else -(-(max_moves // 2) // 2)
        node_members = improve(weight, start, polish=polish, max_swaps=swaps, worth=worth)
        node_members = _relabel(node_members, previous_home // gpus_per_node)
    inner = np.take_along_axis(weight, node_members.reshape(layers, -1, 1), 1)
    inner = inner.reshape(layers * num_nodes, experts // num_nodes, micro_batches)
    if previous_home is None:
        rank_members = improve(inner, assign(inner, gpus_per_node))  # positions within the node: [L*N, G, C]
    else:
        before = np.take_along_axis(previous_home, node_members.reshape(layers, -1), 1).reshape(len(inner), -1)
        before = np.where(
            before // gpus_per_node == np.tile(np.arange(num_nodes), layers)[:, None], before % gpus_per_node, -1
        )
        swaps = None if max_moves is None else max_moves // 2 // 2 // num_nodes
        rank_members = improve(inner, _fill_gaps(before, gpus_per_node), max_swaps=swaps, worth=worth)
        rank_members = _relabel(rank_members, before)
    expert = np.take_along_axis(node_members.reshape(layers * num_nodes, -1), rank_members.reshape(len(inner), -1), 1)
    home = np.empty((layers, experts), np.int32)
    ranks = np.repeat(np.arange(num_nodes * gpus_per_node, dtype=np.int32), experts // (num_nodes * gpus_per_node))
    np.put_along_axis(home, expert.reshape(layers, experts), np.broadcast_to(ranks, (layers, experts)), 1)
    return home


def assign(weight_BEM: np.ndarray, bins: int) -> np.ndarray:
    """int64 [B, bins, E/bins]: a first assignment, greedy, hottest first."""
    problems, experts, micro_batches = weight_BEM.shape
    size = experts // bins
    order = np.argsort(-weight_BEM.sum(2), axis=1, kind="stable")
    load = np.zeros((problems, bins, micro_batches))
    filled = np.zeros((problems, bins), np.int64)
    members = np.empty((problems, bins, size), np.int64)
    rows = np.arange(problems)
    for position in range(experts):
        expert = order[:, position]
        weight = weight_BEM[rows, expert]
        overlap = np.matmul(load, weight[:, :, None])[:, :, 0]
        overlap[filled == size] = np.inf
        target = overlap.argmin(1)
        members[rows, target, filled[rows, target]] = expert
        load[rows, target] += weight
        filled[rows, target] += 1
    return members


def improve(
    weight_BEM: np.ndarray,
    members: np.ndarray,
    *,
    polish: bool = False,
    max_swaps: int | None = None,
    worth: float = 0.0,
) -> np.ndarray:
    """Swap members of bins while that helps; returns a new [B, bins, size].

    max_swaps: at most this many in each problem;  worth: the part of the squared excess that a swap must remove
    """
    members = members.copy()
    problems, bins, _ = members.shape
    if bins == 1:
        return members
    left = np.full(problems, np.iinfo(np.int64).max if max_swaps is None else max_swaps)
    load = weight_BEM[np.arange(problems)[:, None, None], members].sum(2)  # [B, bins, M]
    excess = load - np.floor(load.mean(1, keepdims=True))
    threshold = np.floor(worth * (excess * excess).sum((1, 2)) / 2)
    rounds = _tournament(bins)
    for _ in range(_SWEEPS):
        if sum(_swap_squares(weight_BEM, members, pairs, left, threshold) for pairs in rounds) == 0:
            break
    if polish:
        for _ in range(2):
            for p, q in (pair for pairs in rounds for pair in pairs):
                _swap_busiest(weight_BEM, members, p, q, left)
    return members


def _scaled(table_LME: np.ndarray) -> np.ndarray:
    """float64 [L, E, M], whole numbers below 2 ** _BITS."""
    peak = table_LME.max(axis=(1, 2))
    shift = np.maximum(np.frexp(peak.astype(np.float64))[1] - _BITS, 0)
    return np.ascontiguousarray((table_LME >> shift[:, None, None]).swapaxes(1, 2), np.float64)


def _fill_gaps(before_BE: np.ndarray, bins: int) -> np.ndarray:
    """[B, bins, size]: experts stay in the bin they were in; those that were elsewhere (-1) take the free places."""
    problems, experts = before_BE.shape
    free = experts // bins - (before_BE[:, :, None] == np.arange(bins)).sum(1)  # [B, bins]
    bin_of = before_BE.copy()
    bin_of[before_BE < 0] = np.repeat(np.tile(np.arange(bins), problems), free.reshape(-1))
    return np.argsort(bin_of, axis=1, kind="stable").reshape(problems, bins, -1)


def _relabel(members: np.ndarray, before_BE: np.ndarray) -> np.ndarray:
    """The same groups under the labels that leave most experts where they were (`before_BE`: their old label or -1)."""
    problems, bins, _ = members.shape
    old = np.take_along_axis(before_BE, members.reshape(problems, -1), 1).reshape(members.shape)
    label = match_labels((old[..., None] == np.arange(bins)).sum(2))
    out = np.empty_like(members)
    np.put_along_axis(out, np.broadcast_to(label[:, :, None], members.shape), members, 1)
    return out


def _tournament(bins: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs in which every two bins meet once (the circle method)."""
    ring = list(range(bins + bins % 2))
    rounds = []
    for _ in range(len(ring) - 1):
        pairs = [(ring[i], ring[-1 - i]) for i in range(len(ring) // 2)]
        rounds.append([pair for pair in pairs if max(pair) < bins])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds


def _swap_squares(
    weight_BEM: np.ndarray,
    members: np.ndarray,
    pairs: list[tuple[int, int]],
    left: np.ndarray,
    threshold: np.ndarray,
) -> int:
    """For every pair of bins, the swap that lowers the sum of squares most. How many there were."""
    problems, _, size = members.shape
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    ours, theirs = members[:, first], members[:, second]  # [B, P, size]
    rows = np.arange(problems)[:, None, None]
    w_ours, w_theirs = weight_BEM[rows, ours], weight_BEM[rows, theirs]  # [B, P, size, M]
    gap = (w_ours.sum(2) - w_theirs.sum(2))[..., None]  # [B, P, M, 1]
    # half the change: sum over m of d * (gap + d) with d = w_theirs - w_ours
    of_ours = (w_ours * w_ours).sum(3) - np.matmul(w_ours, gap)[..., 0]
    of_theirs = (w_theirs * w_theirs).sum(3) + np.matmul(w_theirs, gap)[..., 0]
    change = of_ours[..., :, None] + of_theirs[..., None, :] - 2 * np.matmul(w_ours, w_theirs.swapaxes(2, 3))
    change = change.reshape(problems, len(pairs), -1)
    best = change.argmin(2)
    value = np.take_along_axis(change, best[..., None], 2)[..., 0]
    good = value < -threshold[:, None]
    good &= np.cumsum(good, axis=1) <= left[:, None]
    left -= good.sum(1)
    b, p = np.nonzero(good)
    i, j = best[b, p] // size, best[b, p] % size
    members[b, first[p], i], members[b, second[p], j] = theirs[b, p, j], ours[b, p, i]
    return len(b)


def _swap_busiest(weight_BEM: np.ndarray, members: np.ndarray, p: int, q: int, left: np.ndarray) -> None:
    """The swap between bins p and q that lowers the sum over micro-batches of the busiest bin most."""
    problems, bins, size = members.shape
    step = max(1, (1 << 18) // (size * size * weight_BEM.shape[2]))
    for start in range(0, problems, step):
        part = slice(start, min(start + step, problems))
        weight, inside = weight_BEM[part], members[part]
        rows = np.arange(len(inside))
        load = weight[rows[:, None, None], inside].sum(2)  # [b, bins, M]
        others = np.delete(load, [p, q], axis=1).max(1) if bins > 2 else np.zeros_like(load[:, 0])
        w_p, w_q = weight[rows[:, None], inside[:, p]], weight[rows[:, None], inside[:, q]]
        delta = w_q[:, None, :] - w_p[:, :, None]  # [b, size of p, size of q, M]
        busiest = np.maximum(load[:, p, None, None] + delta, load[:, q, None, None] - delta)
        np.maximum(busiest, others[:, None, None], out=busiest)
        after = busiest.sum(3).reshape(len(inside), -1)
        best = after.argmin(1)
        b = np.flatnonzero((after[rows, best] < load.max(1).sum(1)) & (left[part] > 0))
        i, j = best[b] // size, best[b] % size
        inside[b, p, i], inside[b, q, j] = inside[b, q, j], inside[b, p, i]
        left[start + b] -= 1
