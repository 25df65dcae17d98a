"""The split in real numbers: what every host computes so that ranks are level, as near to local-first as that allows.

Hosts are given. Let w be an expert's load, a the preference of a host, u a factor of a rank. A host computes
w * a * u / (the sum of a * u over the expert's hosts). Rounds raise u where a rank has less than the mean and lower it
where it has more (matrix scaling, Sinkhorn and Knopp, over-relaxed). That ends at level ranks where the hosts allow
them, and of all level splits at the one nearest to the preference. All layers and micro-batches are scaled at once,
and only hosts of experts that have several.

Only +, -, *, / and square roots are used, element by element or in a fixed order, so every machine gets the same bits.
"""

import numpy as np

from .hosts import Hosts

_FASTEST = 8.0  # by how much one round may take a rank's load for too small or too large


def preference(hosts: Hosts, wanted_VM: np.ndarray | float, load_FM: np.ndarray) -> np.ndarray:
    """[H, M]: the split that is local-first: each node that hosts an expert takes what its own tokens want of it, and
    what nodes without a host want is shared by those with one; inside a node all hosts get the same."""
    start, group, nodes = hosts.first_of_node, hosts.node_group, hosts.nodes
    size = np.diff(start, append=len(hosts.expert))
    own = np.broadcast_to(np.asarray(wanted_VM, np.float64), (len(start), load_FM.shape[1]))
    rest = (load_FM - nodes.by_expert(own)) / nodes.count[:, None]
    share = (own + rest[nodes.expert]) / size[:, None]
    return share[group] + 1e-9


def relaxed_split(hosts: Hosts, load_FM: np.ndarray, prior_HM: np.ndarray, rounds: int, slack: float) -> np.ndarray:
    """float64 [H, M]: what each host computes.

    Args:
        load_FM: float64 [L * E, M], assignments. prior_HM: see `preference`.
        rounds: at most so many; a layer is done where every rank is within `slack` of the mean.
    """
    split = load_FM[hosts.expert]  # where an expert has one host
    several = hosts.count[hosts.expert] > 1
    alone = hosts.some(~several)
    where, part = np.flatnonzero(several), hosts.some(several)
    load, prior, fixed = load_FM, prior_HM[where], alone.by_rank(split[~several])
    scale = np.ones_like(fixed)
    for turn, last in _turns(rounds):
        mean = np.repeat(load.reshape(part.layers, hosts.experts, -1).sum(1) / hosts.ranks, hosts.ranks, axis=0)
        split[where], at_rank, scale = _scale(part, load, prior, fixed, mean, scale, last - turn)
        off: np.ndarray = np.any((at_rank > mean * (1 + slack) + 0.5).reshape(part.layers, -1), axis=1)
        if last == rounds or not off.any():
            break
        if off.mean() < 0.7:
            part, chosen = part.of_layers(np.flatnonzero(off))
            where, prior = where[chosen], prior[chosen]
            load, fixed, scale = (
                x.reshape(len(off), -1, x.shape[1])[off].reshape(-1, x.shape[1]) for x in (load, fixed, scale)
            )
    return split


def _turns(rounds: int) -> list[tuple[int, int]]:
    """Rounds in groups, after each of which layers that are level leave."""
    ends = [*range(min(6, rounds), rounds, 6), rounds]
    return list(zip([0, *ends], ends, strict=False))


def _scale(
    hosts: Hosts,
    load_FM: np.ndarray,
    prior_HM: np.ndarray,
    fixed: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    rounds: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`rounds` rounds from `scale` [L * R, M]: the split, the load of ranks and the scale it ends with. fixed: what
    ranks compute of other experts."""
    for _ in range(rounds):
        part = prior_HM * scale[hosts.rank]
        factor = load_FM / np.maximum(hosts.by_expert(part), 1e-300)
        part *= factor[hosts.expert]
        load = fixed + hosts.by_rank(part)
        ratio = np.clip(mean / np.maximum(load, 1e-9), 1 / _FASTEST, _FASTEST)
        root = np.sqrt(ratio)
        scale = scale * (ratio * root * np.sqrt(root))
    return part, load, scale


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
