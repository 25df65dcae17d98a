"""Guests: replicas of another node's experts, the same for the whole batch.

No replica inside a node can help a micro-batch in which the node as a whole has more than its share. Guests can, as the
edges of a flow between nodes (nodeflow.py). They are chosen greedily by how much flow they add over the batch, for all
layers at once; then their flow is computed; then they are given ranks.
"""

from dataclasses import dataclass

import numpy as np

from .nodeflow import NodeFlow

_SUM_TOLERANCE = 5e-4  # a layer's nodes are level when the worst of them, summed over micro-batches, is this far above
_PEAK_TOLERANCE = 1e-2  # ... and no micro-batch has a node further above than this
_LEAST_GAIN = 2e-4  # of a node's load over the batch: guests that add less flow are worth it only for a peak


@dataclass(frozen=True, eq=False)
class Guests:
    """One entry a guest, in the order they were chosen: layer, expert, its home node, the node that hosts it, and how
    many assignments it could move over the batch when it was chosen."""

    layer: np.ndarray
    expert: np.ndarray
    donor: np.ndarray
    node: np.ndarray
    gain: np.ndarray

    def __len__(self) -> int:
        return len(self.layer)

    def where(self, keep: np.ndarray) -> "Guests":
        return Guests(self.layer[keep], self.expert[keep], self.donor[keep], self.node[keep], self.gain[keep])


@dataclass(frozen=True, eq=False)
class NodeProblem:
    """What guests are chosen for: loads [L, M, E], the experts' nodes [L, E], and what a rank is to carry [L, M].

    slack: a factor on how level the nodes must get; 1 is for the best plan
    candidates: only this many of a node's experts, the hottest, may become guests
    fill:  how much of a rank's capacity one guest may take. With a rank full of guest, its own experts must all find
           room elsewhere; with little, more guests are needed.
    """

    table_LME: np.ndarray
    node_LE: np.ndarray
    capacity_LM: np.ndarray
    num_nodes: int
    gpus_per_node: int
    fill: float
    slack: float = 1.0
    candidates: int | None = None

    @property
    def limit(self) -> np.ndarray:
        """int64 [L, M]: what one guest may take."""
        return np.ceil(self.capacity_LM * self.fill).astype(np.int64)

    def members(self) -> np.ndarray:
        """int64 [L, N, E/N]: the experts of every node."""
        return np.argsort(self.node_LE, axis=1, kind="stable").reshape(len(self.node_LE), self.num_nodes, -1)

    def flow(self) -> NodeFlow:
        layers, micro_batches, experts = self.table_LME.shape
        load = np.take_along_axis(self.table_LME, self.members().reshape(layers, 1, experts), 2)
        load = load.reshape(layers * micro_batches, self.num_nodes, -1).sum(2)
        capacity = self.capacity_LM.reshape(-1) * self.gpus_per_node
        # Twice as fast in 32 bits, which hold what all edges of a micro-batch together carry at most.
        dtype = np.int32 if load.sum(1).max(initial=0) < 1 << 29 and capacity.max(initial=0) < 1 << 29 else np.int64
        return NodeFlow(np.ascontiguousarray(load.T, dtype), capacity.astype(dtype))


def choose_guests(problem: NodeProblem, per_node: int) -> tuple[Guests, np.ndarray]:
    """Guests that level the nodes, at most `per_node` a node and layer, and what each takes, int64 [guests, M].

    Those of a layer are in the order chosen.
    """
    layers, micro_batches, _ = problem.table_LME.shape
    nodes, limit = problem.num_nodes, problem.limit
    capacity = problem.capacity_LM * problem.gpus_per_node
    members = problem.members()
    rest = problem.table_LME.swapaxes(1, 2)[np.arange(layers)[:, None, None], members]  # [L, N, E/N, M]
    if problem.candidates is not None:
        hottest = np.argsort(-rest.sum(3), axis=2, kind="stable")[:, :, : problem.candidates]
        members = np.take_along_axis(members, hottest, 2)
        rest = np.take_along_axis(rest, hottest[..., None], 2)
    flow = problem.flow()
    # Gains are compared at a scale at which sums over micro-batches fit 32 bits.
    bits = 30 - micro_batches.bit_length()
    shift = np.maximum(np.frexp(limit.max(1).astype(np.float64))[1] - bits, 0)
    weight = (np.minimum(rest, limit[:, None, None]) >> shift[:, None, None, None]).astype(np.int32)
    least = (capacity.sum(1) * _LEAST_GAIN).astype(np.int64) >> shift
    hosted = np.zeros((layers, nodes), np.int64)
    coarse = np.ones(layers, np.bool_)  # still lowering the sum; after that only peaks
    active = np.arange(layers)
    found, bounds = [np.zeros((5, 0), np.int64)], [np.zeros((0, micro_batches), np.int64)]
    while per_node:
        worst = flow.over_NX.max(0).reshape(layers, micro_batches)
        peak = worst > capacity * (_PEAK_TOLERANCE * problem.slack)
        coarse &= worst.sum(1) > capacity.sum(1) * (_SUM_TOLERANCE * problem.slack)
        active = active[coarse[active] | peak[active].any(1)]
        if not len(active):
            break
        supply, sink = (
            (x.reshape(nodes, layers, micro_batches)[:, active].swapaxes(0, 1) >> shift[active, None, None])
            for x in flow.reach()
        )
        supply *= (peak[active] | coarse[active, None])[:, None]
        sink *= (hosted[active] < per_node)[:, :, None]
        offer = np.minimum(weight[active], np.minimum(supply, 1 << bits)[:, :, None].astype(np.int32))
        sink = np.minimum(sink, 1 << bits).astype(np.int32)
        gain = np.stack(
            [np.minimum(offer, sink[:, None, None, node]).sum(3, dtype=np.int32) for node in range(nodes)], 3
        )
        gain[:, np.arange(nodes), :, np.arange(nodes)] = 0
        flat = gain.reshape(len(active), -1)
        best = flat.argmax(1)
        value = flat[np.arange(len(active)), best]
        enough = value >= np.where(coarse[active], np.maximum(least[active], 1), 1)
        coarse[active[~enough]] = False
        remaining, (layer, best, value) = active[value > 0], (x[enough] for x in (active, best, value))
        donor, index, node = np.unravel_index(best, gain.shape[1:])
        found.append(
            np.stack([layer, members[layer, donor, index], donor, node, value.astype(np.int64) << shift[layer]])
        )
        amount = np.minimum(rest[layer, donor, index], limit[layer])
        bounds.append(amount)
        flow.add(layer, donor, node, amount)
        hosted[layer, node] += 1
        rest[layer, donor, index] -= amount  # what an expert has beyond a guest's limit may go to another one
        weight[layer, donor, index] = np.minimum(rest[layer, donor, index], limit[layer]) >> shift[layer, None]
        active = remaining
    guests = Guests(*np.concatenate(found, 1))
    return guests, _fill_up(problem, guests, flow, np.concatenate(bounds))


def carry(problem: NodeProblem, guests: Guests) -> np.ndarray:
    """int64 [guests, M]: what each of these guests takes in each micro-batch."""
    _, micro_batches, _ = problem.table_LME.shape
    flow = problem.flow()
    rest = problem.table_LME.copy()
    bound = np.zeros((len(guests), micro_batches), np.int64)
    for turn in in_turn(guests.layer):
        layer, expert = guests.layer[turn], guests.expert[turn]
        bound[turn] = np.minimum(rest[layer, :, expert], problem.limit[layer])
        rest[layer, :, expert] -= bound[turn]
        flow.add(layer, guests.donor[turn], guests.node[turn], bound[turn])
    return _fill_up(problem, guests, flow, bound)


def _fill_up(problem: NodeProblem, guests: Guests, flow: NodeFlow, bound: np.ndarray) -> np.ndarray:
    """What each guest takes, given a flow in which guests may take up to `bound`; where that is short, up to a rank."""
    layers, micro_batches, _ = problem.table_LME.shape
    edge = flow.residual_NNX.reshape(problem.num_nodes, problem.num_nodes, layers, micro_batches)
    rest = problem.table_LME.copy()
    np.subtract.at(rest.swapaxes(1, 2), (guests.layer, guests.expert), bound)
    turns = in_turn(guests.layer)
    flow.push()
    short = flow.over_NX.any(0).reshape(layers, micro_batches)
    for turn in turns:
        layer, expert = guests.layer[turn], guests.expert[turn]
        more = np.minimum(rest[layer, :, expert], problem.capacity_LM[layer] - bound[turn]) * short[layer]
        rest[layer, :, expert] -= more
        bound[turn] += more
        edge[guests.donor[turn], guests.node[turn], layer] += more
    for _ in range(3):
        flow.push()

    moved = np.zeros(edge.shape, np.int64)
    np.add.at(moved, (guests.donor, guests.node, guests.layer), bound)
    moved = np.maximum(moved - edge, 0)  # opposite flows between two nodes have cancelled
    taken = np.zeros_like(bound)
    for turn in turns:
        place = guests.donor[turn], guests.node[turn], guests.layer[turn]
        taken[turn] = np.minimum(bound[turn], moved[place])
        moved[place] -= taken[turn]
    return taken


def seat(
    guests: Guests, taken: np.ndarray, load_LMR: np.ndarray, problem: NodeProblem, guests_a_rank: int
) -> np.ndarray:
    """int64 [guests]: the rank of each guest: of its node's ranks with the fewest guests, the one it overloads least.

    -1 where every rank that has a slot left holds the expert already.

    load_LMR is what ranks have without guests, and is changed to include them.
    """
    gpus = problem.gpus_per_node
    layers, _, experts = problem.table_LME.shape
    rank = np.zeros(len(guests), np.int64)
    holds = np.zeros((layers, load_LMR.shape[2], experts), np.bool_)
    biggest_first = np.lexsort((-taken.sum(1), guests.layer))
    for turn in in_turn(guests.layer[biggest_first]):
        index = biggest_first[turn]
        layer, expert = guests.layer[index], guests.expert[index]
        span = guests.node[index, None] * gpus + np.arange(gpus)  # ranks of the node
        load = load_LMR[layer[:, None], :, span]  # [guests, G, M]
        excess = np.maximum(load + taken[index, None] - problem.capacity_LM[layer, None], 0).sum(2)
        held = holds[layer[:, None], span]
        row = np.arange(len(index))
        blocked = held[row, :, expert] | (held.sum(2) >= guests_a_rank)
        best = np.lexsort(np.stack([load.sum(2), excess, held.sum(2), blocked]), axis=1)[:, 0]
        rank[index] = np.where(blocked[row, best], -1, span[row, best])
        seated = ~blocked[row, best]
        layer, index, expert = layer[seated], index[seated], expert[seated]
        load_LMR[layer, :, rank[index]] += taken[index]
        holds[layer, rank[index], expert] = True
    return rank


def in_turn(layer: np.ndarray) -> list[np.ndarray]:
    """Indices of the first guest of every layer, of the second, and so on."""
    index = running_index(layer)
    return [np.flatnonzero(index == turn) for turn in range(int(index.max(initial=-1)) + 1)]


def running_index(key: np.ndarray) -> np.ndarray:
    """For every entry, how many entries before it have the same key."""
    order = np.argsort(key, kind="stable")
    first = np.flatnonzero(np.diff(key[order], prepend=-1))
    index = np.empty(len(key), np.int64)
    index[order] = np.arange(len(key)) - np.repeat(first, np.diff([*first, len(key)]))
    return index
