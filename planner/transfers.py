"""Who sends a replica its weights, which is also who takes its gradient: a function of the plan, the same on every
rank.

Fetched replicas come from the least busy holder on their node: the expert's home, or a rank that keeps it. Kept
replicas come from the home, but only once to every other node: one of the node's ranks that keep the expert, its
relay, hands the weights on to the others, and adds up their gradients before its own goes home.
"""

import numpy as np


def fetch_sources(
    home_LE: np.ndarray, replicas_LMRS: np.ndarray, kept_LRS: np.ndarray, gpus_per_node: int
) -> np.ndarray:
    """int32 [L, M, R, S]: the rank that sends each fetched replica; -1 where the slot is empty or its replica is kept.

    In every layer and micro-batch, replicas with a single holder on their node come first. The others follow in the
    order of rank and slot, each from the holder with the fewest replicas to send so far, the lowest rank where some
    have equally few.
    """
    out = np.full(replicas_LMRS.shape, -1, np.int32)
    layer, micro_batch, rank, slot = np.nonzero((replicas_LMRS >= 0) & ~kept_LRS[:, None])
    if not len(layer):
        return out
    expert = replicas_LMRS[layer, micro_batch, rank, slot]
    node, ranks = rank // gpus_per_node, replicas_LMRS.shape[2]
    holds = _holders(home_LE, replicas_LMRS, kept_LRS, gpus_per_node)[layer, expert, node]  # [X, G]
    source = node * gpus_per_node + holds.argmax(1)
    several = holds.sum(1) > 1
    if several.any():
        pair = layer * replicas_LMRS.shape[1] + micro_batch
        busy = np.bincount((pair * ranks + source)[~several], minlength=replicas_LMRS[..., 0].size)
        busy = busy.reshape(-1, gpus_per_node)  # [L * M * N, G]
        row = pair * (ranks // gpus_per_node) + node
        index = np.flatnonzero(several)
        order = index[np.argsort(row[index], kind="stable")]  # within a node: by rank and slot, as np.nonzero gave them
        turn = np.arange(len(order)) - np.searchsorted(row[order], row[order])
        for now in range(int(turn.max()) + 1):  # the first of every node at once, then the second
            chosen = order[turn == now]
            free = np.where(holds[chosen], busy[row[chosen]], np.iinfo(np.int64).max).argmin(1)
            busy[row[chosen], free] += 1
            source[chosen] = node[chosen] * gpus_per_node + free
    out[layer, micro_batch, rank, slot] = source
    return out


def kept_sources(
    home_LE: np.ndarray, replicas_LMRS: np.ndarray, kept_LRS: np.ndarray, gpus_per_node: int
) -> np.ndarray:
    """int32 [L, R, S]: the rank that sends each kept replica; -1 where a slot keeps nothing.

    It is the home on the home's own node, and on another node for the relay; for the others there it is the relay. Of
    the c ranks of a node that keep expert e, the relay is number e % c, so that no rank is the relay of everything.
    """
    held_LRS = replicas_LMRS[:, 0] if replicas_LMRS.shape[1] else np.full_like(kept_LRS, -1, np.int32)
    out = np.full(kept_LRS.shape, -1, np.int32)
    layer, rank, slot = np.nonzero(kept_LRS & (held_LRS >= 0))
    expert, node = held_LRS[layer, rank, slot], rank // gpus_per_node
    home = home_LE[layer, expert]
    group = (layer * home_LE.shape[1] + expert) * (kept_LRS.shape[1] // gpus_per_node) + node
    order = np.argsort(group, kind="stable")  # within a group by rank
    first = np.searchsorted(group[order], group)
    count = np.searchsorted(group[order], group, "right") - first
    relay = rank[order[first + expert % np.maximum(count, 1)]] if len(order) else rank
    far = (home // gpus_per_node != node) & (relay != rank)
    out[layer, rank, slot] = np.where(far, relay, home)
    return out


def _holders(home_LE: np.ndarray, replicas_LMRS: np.ndarray, kept_LRS: np.ndarray, gpus_per_node: int) -> np.ndarray:
    """bool [L, E, N, G]: ranks that have an expert for the whole batch: its home, and those that keep it."""
    layers, experts = home_LE.shape
    ranks = replicas_LMRS.shape[2]
    holds = np.zeros((layers, experts, ranks), np.bool_)
    holds[np.arange(layers)[:, None], np.arange(experts), home_LE] = True
    layer, rank, slot = np.nonzero(kept_LRS & (replicas_LMRS[:, 0] >= 0))
    holds[layer, replicas_LMRS[layer, 0, rank, slot], rank] = True
    return holds.reshape(layers, experts, -1, gpus_per_node)
