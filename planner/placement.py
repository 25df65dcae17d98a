"""Inter-batch reordering: which rank owns each expert for the whole batch.

Nodes first, then the ranks inside each node, by the same two steps for all layers at once. Loads over micro-batches are
vectors: experts that are hot in the same micro-batches must not share a node.

* `assign`: longest processing time. Hottest expert first, to the bin with room whose load overlaps least with it.
* `improve`: pairwise swaps. First those that lower the sum of squares of bin loads, which is separable over bins, so
  that disjoint pairs of bins swap at once; then those that lower the sum over micro-batches of the busiest bin.

All arithmetic is on integers that float64 holds exactly, so the order of summation, and with it the number of threads,
cannot change the outcome.
"""

import numpy as np

_BITS = 15  # loads are scaled to this many bits here: products summed over experts and micro-batches stay exact


def place(table_LME: np.ndarray, num_nodes: int, gpus_per_node: int) -> np.ndarray:
    """int32 [L, E]: the home rank of every expert. E must divide over the ranks."""
    layers, micro_batches, experts = table_LME.shape
    weight = _scaled(table_LME)  # [L, E, M]
    node_members = improve(weight, assign(weight, num_nodes))  # [L, N, E/N]
    inner = np.take_along_axis(weight, node_members.reshape(layers, -1, 1), 1)
    inner = inner.reshape(layers * num_nodes, experts // num_nodes, micro_batches)
    rank_members = improve(inner, assign(inner, gpus_per_node))  # positions within the node: [L*N, G, C]
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


def improve(weight_BEM: np.ndarray, members: np.ndarray, max_sweeps: int = 8) -> np.ndarray:
    """Swap members of bins while that helps; returns a new [B, bins, size]."""
    members = members.copy()
    if members.shape[1] == 1:
        return members
    rounds = _tournament(members.shape[1])
    for _ in range(max_sweeps):
        if sum(_swap_squares(weight_BEM, members, pairs) for pairs in rounds) == 0:
            break
    pairs = [pair for matches in rounds for pair in matches]
    for _ in range(max_sweeps):
        if sum(_swap_busiest(weight_BEM, members, p, q) for p, q in pairs) == 0:
            break
    return members


def _scaled(table_LME: np.ndarray) -> np.ndarray:
    """float64 [L, E, M], whole numbers below 2 ** _BITS."""
    peak = table_LME.max(axis=(1, 2))
    shift = np.maximum(np.frexp(peak.astype(np.float64))[1] - _BITS, 0)
    return np.ascontiguousarray((table_LME >> shift[:, None, None]).swapaxes(1, 2), np.float64)


def _tournament(bins: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs in which every two bins meet once (the circle method)."""
    ring = list(range(bins + bins % 2))
    rounds = []
    for _ in range(len(ring) - 1):
        pairs = [(ring[i], ring[-1 - i]) for i in range(len(ring) // 2)]
        rounds.append([pair for pair in pairs if max(pair) < bins])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds


def _swap_squares(weight_BEM: np.ndarray, members: np.ndarray, pairs: list[tuple[int, int]]) -> int:
    """For every pair of bins, the swap that lowers the sum of squares most. How many there were."""
    problems, _, size = members.shape
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    left, right = members[:, first], members[:, second]  # [B, P, size]
    rows = np.arange(problems)[:, None, None]
    w_left, w_right = weight_BEM[rows, left], weight_BEM[rows, right]  # [B, P, size, M]
    gap = (w_left.sum(2) - w_right.sum(2))[..., None]  # [B, P, M, 1]
    # half the change: sum over m of d * (gap + d) with d = w_right - w_left
    of_left = (w_left * w_left).sum(3) - np.matmul(w_left, gap)[..., 0]
    of_right = (w_right * w_right).sum(3) + np.matmul(w_right, gap)[..., 0]
    change = of_left[..., :, None] + of_right[..., None, :] - 2 * np.matmul(w_left, w_right.swapaxes(2, 3))
    best = change.reshape(problems, len(pairs), -1).argmin(2)
    value = np.take_along_axis(change.reshape(problems, len(pairs), -1), best[..., None], 2)[..., 0]
    b, p = np.nonzero(value < 0)
    i, j = best[b, p] // size, best[b, p] % size
    members[b, first[p], i], members[b, second[p], j] = right[b, p, j], left[b, p, i]
    return len(b)


def _swap_busiest(weight_BEM: np.ndarray, members: np.ndarray, p: int, q: int) -> int:
    """The swap between bins p and q that lowers the sum over micro-batches of the busiest bin most. How many."""
    problems, bins, size = members.shape
    swapped = 0
    step = max(1, (1 << 22) // (size * size * weight_BEM.shape[2]))
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
        b = np.flatnonzero(after[rows, best] < load.max(1).sum(1))
        i, j = best[b] // size, best[b] % size
        inside[b, p, i], inside[b, q, j] = inside[b, q, j], inside[b, p, i]
        swapped += len(b)
    return swapped
