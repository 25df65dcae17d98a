"""How load moves between nodes over guests: a maximum flow for every (layer, micro-batch), all at once.

A guest is an edge from its expert's home node to the node that hosts it. Excess need not go straight to where there is
room: a node in between takes it and passes on load of its own, so that few guests connect every node with every other.
"""

from itertools import pairwise

import numpy as np


class NodeFlow:
    """Arrays have X = (layer, micro-batch) last.

    over_NX, room_NX: what each node still has above and below its capacity
    residual_NNX:     what the edges from one node to another can still carry; flow may also be sent back
    """

    def __init__(self, load_NX: np.ndarray, capacity_X: np.ndarray) -> None:
        self.over_NX = np.maximum(load_NX - capacity_X, 0)
        self.room_NX = np.maximum(capacity_X - load_NX, 0)
        self.residual_NNX = np.zeros((len(load_NX), *load_NX.shape), load_NX.dtype)

    def add(self, layer: np.ndarray, start: np.ndarray, end: np.ndarray, amount_AM: np.ndarray) -> None:
        """An edge in each of these layers, none twice, and what now flows over it alone or with one edge more.

        What its flow makes possible elsewhere, by being sent back, is left to `push`.
        """
        micro_batches = amount_AM.shape[1]
        column = (layer[:, None] * micro_batches + np.arange(micro_batches)).reshape(-1)
        start, end = np.repeat(start, micro_batches), np.repeat(end, micro_batches)
        self.residual_NNX[start, end, column] += amount_AM.reshape(-1).astype(self.over_NX.dtype)
        open_ = np.flatnonzero(self.over_NX[:, column].any(0))
        start, end, column = start[open_], end[open_], column[open_]
        self._send([start, end], column)
        for other in range(len(self.over_NX)):
            third = np.full_like(start, other)
            self._send([start, end, third], column)
            self._send([third, start, end], column)

    def push(self) -> None:
        """Move excess to room, straight or over one node in between, wherever that is possible."""
        columns = np.flatnonzero(self.over_NX.any(0) & self.room_NX.any(0))
        nodes = len(self.over_NX)
        if not len(columns):
            return
        over, room, residual = self.over_NX[:, columns], self.room_NX[:, columns], self.residual_NNX[:, :, columns]
        for p, q in zip(*np.nonzero(residual.any(2)), strict=True):
            amount = np.minimum(np.minimum(over[p], room[q]), residual[p, q])
            over[p] -= amount
            room[q] -= amount
            residual[p, q] -= amount
            residual[q, p] += amount
        for p in range(nodes):
            # The few columns in which p still has excess, in copies that stay in the cache.
            few = np.flatnonzero(over[p])
            o, r, c = over[p, few], room[:, few], residual[:, :, few]
            usable = np.asarray(np.any(c, axis=2))
            for q in range(nodes):
                vias = np.flatnonzero(usable[p] & usable[:, q])
                if q != p and len(vias):
                    _send_over(o, r[q], c, p, vias, q)
            over[p, few], room[:, few], residual[:, :, few] = o, r, c
        self.over_NX[:, columns], self.room_NX[:, columns], self.residual_NNX[:, :, columns] = over, room, residual

    def reach(self) -> tuple[np.ndarray, np.ndarray]:
        """What could arrive at each node to be sent on, and what each could keep or send on; both [N, X]."""
        supply = self.over_NX + np.minimum(self.residual_NNX, self.over_NX[:, None]).sum(0)
        sink = self.room_NX + np.minimum(self.residual_NNX, self.room_NX[None]).sum(1)
        return supply, sink

    def _send(self, way: list[np.ndarray], column: np.ndarray) -> None:
        """From the first node of a way to its last, one way a column, what the edges carry.

        A way that visits a node twice carries nothing: no node has an edge to itself, or both excess and room.
        """
        amount = np.minimum(self.over_NX[way[0], column], self.room_NX[way[-1], column])
        for start, end in pairwise(way):
            np.minimum(amount, self.residual_NNX[start, end, column], out=amount)
        some = np.flatnonzero(amount)
        amount, column, way = amount[some], column[some], [node[some] for node in way]
        self.over_NX[way[0], column] -= amount
        self.room_NX[way[-1], column] -= amount
        for start, end in pairwise(way):
            self.residual_NNX[start, end, column] -= amount
            self.residual_NNX[end, start, column] += amount


def _send_over(over: np.ndarray, room: np.ndarray, residual: np.ndarray, p: int, vias: np.ndarray, q: int) -> None:
    """From p to q over each of `vias`: no two ways share an edge, so each takes what it carries of what is left."""
    amount = np.minimum(residual[p, vias], residual[vias, q])
    sent = np.minimum(amount.cumsum(0, dtype=amount.dtype), np.minimum(over, room))
    over -= sent[-1]
    room -= sent[-1]
    amount = np.diff(sent, axis=0, prepend=np.zeros_like(sent[:1]))
    residual[p, vias] -= amount
    residual[vias, p] += amount
    residual[vias, q] -= amount
    residual[q, vias] += amount
