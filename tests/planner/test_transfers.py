"""Who sends a replica: the least busy holder on its node, and once to a node."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from relibra_kernels.planner import BatchPlan


def plan(home, held, kept, gpus_per_node, micro_batches=1):
    """One layer: `held` [R, S] in every micro-batch, `kept` [R, S]."""
    replicas = np.broadcast_to(np.asarray(held)[None, None], (1, micro_batches, *np.shape(held))).copy()
    kept = np.asarray(kept, bool)[None]
    return BatchPlan(np.asarray(home)[None], replicas, np.zeros_like(replicas), kept, gpus_per_node)


def test_fetched_replicas_come_from_the_least_busy_holder():
    """Expert 0 lives on rank 0 and is kept on rank 1; ranks 2 and 3 fetch it, rank 2 also another of rank 0."""
    one = plan([0, 0, 1, 1, 2, 2, 3, 3], [[-1, -1], [0, -1], [0, 1], [0, -1]], [[0, 0], [1, 0], [0, 0], [0, 0]], 4)
    source = one.sources()[0, 0]
    assert source[2, 1] == 0  # expert 1 has one holder
    assert source[2, 0] == 1  # so expert 0 comes from the other
    assert source[3, 0] == 0  # equally busy now: the lowest rank
    assert source[1].tolist() == [-1, -1]
    assert one.kept_sources()[0].tolist() == [[-1, -1], [0, -1], [-1, -1], [-1, -1]]


def test_weights_cross_to_a_node_once_and_are_handed_on():
    home = np.arange(8) // 2  # ranks 0 and 1 on node 0, 2 and 3 on node 1
    for expert in (0, 1):
        one = plan(home, [[-1], [expert], [expert], [expert]], [[0], [1], [1], [1]], 2)
        relay = 2 + expert
        source = one.kept_sources()[0, :, 0]
        assert source[1] == 0  # beside its home
        assert source[relay] == 0
        assert source[5 - relay] == relay


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_senders_hold_what_they_send(seed):
    rng = np.random.default_rng(seed)
    layers, micro_batches, ranks, slots, gpus = 2, 3, 6, 3, 3
    home = np.stack([rng.permutation(np.arange(13) % ranks) for _ in range(layers)])
    replicas = np.full((layers, micro_batches, ranks, slots), -1)
    kept = np.zeros((layers, ranks, slots), bool)
    for layer in range(layers):
        for rank in range(ranks):
            away = rng.permutation(np.flatnonzero(home[layer] != rank))
            kept[layer, rank, 0] = True
            replicas[layer, :, rank, 0] = away[0]
    held = {(layer, rank, e) for layer in range(layers) for e, rank in enumerate(home[layer])}
    held |= {(layer, rank, int(replicas[layer, 0, rank, 0])) for layer in range(layers) for rank in range(ranks)}
    for layer, m, rank in np.ndindex(layers, micro_batches, ranks):
        near = {e for low, r, e in held if low == layer and r // gpus == rank // gpus}
        own = {e for low, r, e in held if (low, r) == (layer, rank)}
        replicas[layer, m, rank, 1:] = rng.permutation([*(near - own), -1, -1])[: slots - 1]
    one = BatchPlan(home, replicas, np.zeros_like(replicas), kept, gpus)
    source = one.sources()
    assert ((source >= 0) == ((replicas >= 0) & ~kept[:, None])).all()
    for layer, m, rank, slot in np.argwhere(source >= 0):
        sender = source[layer, m, rank, slot]
        assert sender // gpus == rank // gpus and sender != rank
        assert (layer, sender, replicas[layer, m, rank, slot]) in held
    for layer in range(layers):
        crossings = set()
        for rank in range(ranks):
            expert, sender = int(replicas[layer, 0, rank, 0]), int(one.kept_sources()[layer, rank, 0])
            assert (layer, sender, expert) in held and sender != rank
            if sender // gpus != rank // gpus:
                assert sender == home[layer, expert]
                assert (expert, rank // gpus) not in crossings
                crossings.add((expert, rank // gpus))
