"""FlashLB's idea (vllm-ascend): copies chosen on load vectors over micro-batches instead of on their sum, kept for the
batch; with the best split per micro-batch, which makes it the strongest of the baselines that send no weights per
micro-batch. Copies go where the vectors overlap least, without regard to nodes.
"""

import numpy as np

from ...cluster import ClusterSpec
from ...plan import contiguous_home, held_experts
from ...pricing.outcome import Outcome
from ...solver.kept import NodeRule, choose_replicas, pack, shares
from .copies import outcome_of_instances


def flashlb(table_LME: np.ndarray, cluster: ClusterSpec) -> Outcome:
    layers, _, experts = table_LME.shape
    ranks, slots = cluster.num_ranks, cluster.replica_slots
    home = contiguous_home(layers, experts, ranks)
    share = shares(table_LME, ranks)
    layer, expert = choose_replicas(share, slots * ranks * layers, slots * ranks, ranks)
    kept_replicas = pack(share, home, layer, expert, cluster, slots * layers, NodeRule())
    held = held_experts(home, ranks)
    places = np.full((layers, ranks, held.shape[2] + slots), -1, np.int64)
    places[:, :, : held.shape[2]] = held
    for layer, expert, rank in zip(kept_replicas.layer, kept_replicas.expert, kept_replicas.rank, strict=True):
        places[layer, rank, (places[layer, rank] < 0).argmax()] = expert
    return outcome_of_instances(table_LME, places, cluster, best_split=True, extra_slots=slots)
