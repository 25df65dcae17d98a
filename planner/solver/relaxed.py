"""The split in real numbers: what every host computes so that ranks are level, as near to local-first as that allows.

Hosts are given. Let w be an expert's load, a the preference of a host, u a factor of a rank. A host computes
w * a * u / (the sum of a * u over the expert's hosts). Rounds raise u where a rank has less than the mean and lower it
where it has more (matrix scaling, Sinkhorn and Knopp, over-relaxed). That ends at level ranks where the hosts allow
them, and of all level splits at the one nearest to the preference. All layers and micro-batches are scaled at once.

Only +, -, *, / and square roots are used, element by element or in a fixed order, so every machine gets the same bits.
"""

import numpy as np

from .hosts import Hosts

_FASTEST = 8.0  # by how much one round may take a rank's load for too small or too large


def preference(hosts: Hosts, wanted_VM: np.ndarray | float, load_FM: np.ndarray) -> np.ndarray:
    """[H, M]: the split that is local-first: each node that hosts an expert takes what its own tokens want of it, and
    what nodes without a host want is shared by those with one; inside a node all hosts get the same."""
    start, group = hosts.first_of_node, hosts.node_group
    size = np.diff(start, append=len(hosts.expert))
    expert = hosts.expert[start]
    nodes = np.bincount(expert, minlength=len(load_FM))[expert]
    own = np.broadcast_to(np.asarray(wanted_VM, np.float64), (len(start), load_FM.shape[1]))
    first = np.searchsorted(expert, np.arange(len(load_FM)))
    rest = load_FM - np.add.reduceat(own, first, axis=0)
    share = (own + rest[expert] / nodes[:, None]) / size[:, None]
    return share[group] + 1e-9


def relaxed_split(
    hosts: Hosts, load_FM: np.ndarray, prior_HM: np.ndarray, rounds: int, slack: float
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [H, M] and [L * R, M]: what each host computes, and what each rank does.

    Args:
        load_FM: float64 [L * E, M], assignments. prior_HM: see `preference`.
        rounds: at most so many; it ends where every rank is within `slack` of the mean.
    """
    layers, ranks = hosts.layers, hosts.ranks
    mean_LM = load_FM.reshape(layers, hosts.experts, -1).sum(1) / ranks
    split, load = np.empty_like(prior_HM), np.empty((layers * ranks, load_FM.shape[1]))
    active = np.arange(layers)
    for turn, last in _turns(rounds):
        if turn == 0:
            part, where = hosts, np.arange(len(hosts.expert))
            w, prior, mean = load_FM, prior_HM, np.repeat(mean_LM, ranks, axis=0)
            scale = np.ones_like(load)
        x, at_rank, scale = _scale(part, w, prior, mean, scale, last - turn)
        split[where] = x
        load.reshape(layers, ranks, -1)[active] = at_rank.reshape(len(active), ranks, -1)
        off: np.ndarray = np.any((at_rank > mean * (1 + slack) + 0.5).reshape(len(active), -1), axis=1)
        if last == rounds or not off.any():
            break
        if off.mean() < 0.7:
            active = active[off]
            part, where = _of_layers(hosts, active)
            w = load_FM.reshape(layers, hosts.experts, -1)[active].reshape(-1, load_FM.shape[1])
            prior, mean = prior_HM[where], np.repeat(mean_LM[active], ranks, axis=0)
            scale = scale.reshape(len(off), ranks, -1)[off].reshape(-1, load_FM.shape[1])
    return split, load


def _turns(rounds: int) -> list[tuple[int, int]]:
    """Rounds in groups, after each of which layers that are level leave."""
    ends = [*range(min(6, rounds), rounds, 6), rounds]
    return list(zip([0, *ends], ends, strict=False))


def _scale(
    hosts: Hosts, load_FM: np.ndarray, prior_HM: np.ndarray, mean: np.ndarray, scale: np.ndarray, rounds: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`rounds` rounds from `scale` [L * R, M]: the split, the load of ranks and the scale it ends with."""
    for _ in range(rounds):
        part = prior_HM * scale[hosts.rank]
        factor = load_FM / np.add.reduceat(part, hosts.first, axis=0)
        part *= factor[hosts.expert]
        load = hosts.of_rank(part)
        ratio = np.clip(mean / np.maximum(load, 1e-9), 1 / _FASTEST, _FASTEST)
        root = np.sqrt(ratio)
        scale = scale * (ratio * root * np.sqrt(root))
    return part, load, scale


def _of_layers(hosts: Hosts, layers: np.ndarray) -> tuple[Hosts, np.ndarray]:
    """The hosts of some layers alone, and where they are among all."""
    new = np.full(hosts.layers, -1)
    new[layers] = np.arange(len(layers))
    layer = hosts.expert // hosts.experts
    where = np.flatnonzero(new[layer] >= 0)
    to = new[layer[where]]
    expert = hosts.expert[where] % hosts.experts + to * hosts.experts
    rank = hosts.rank[where] % hosts.ranks + to * hosts.ranks
    return Hosts(expert, rank, len(layers), hosts.experts, hosts.ranks, hosts.gpus_per_node), where


def level_nodes(hosts: Hosts, load_FM: np.ndarray, split_HM: np.ndarray, rounds: int) -> np.ndarray:
    """The split scaled by node instead of by rank: nodes become level, ranks inside them need not."""
    gpus = hosts.gpus_per_node
    mean = load_FM.reshape(hosts.layers, hosts.experts, -1).sum(1) / (hosts.ranks // gpus)
    mean = np.repeat(mean, hosts.ranks // gpus, axis=0)
    split = split_HM
    for _ in range(rounds):
        load = hosts.of_rank(split).reshape(len(mean), gpus, -1).sum(1)
        ratio = np.clip(mean / np.maximum(load, 1e-9), 1 / _FASTEST, _FASTEST)
        part = split * (ratio * np.sqrt(ratio))[hosts.rank // gpus]
        part += 1e-9
        split = part * (load_FM / np.add.reduceat(part, hosts.first, axis=0))[hosts.expert]
    return split


def whole_split(hosts: Hosts, split_HM: np.ndarray, load_FM: np.ndarray) -> np.ndarray:
    """int64 [H, M]: the same in whole assignments; sums over an expert's hosts are its load."""
    running = np.cumsum(split_HM, axis=0)
    before = np.where(hosts.first[:, None] > 0, running[hosts.first - 1], 0.0)
    upto = np.floor(running - before[hosts.expert] + 0.5).astype(np.int64)
    load = load_FM.astype(np.int64)
    upto = np.minimum(upto, load[hosts.expert])
    last = hosts.first + hosts.count - 1
    upto[last] = load
    below = np.empty_like(upto)
    below[1:] = upto[:-1]
    below[hosts.first] = 0
    return upto - below
