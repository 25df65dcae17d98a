"""How load moves between nodes over guests: a maximum flow for every (layer, micro-batch), all at once.

A guest is an edge from its expert's home node to the node that hosts it. Excess need not go straight to where there is
room: a node in between takes it and passes on load of its own, so that few guests connect every node with every other.
"""

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

    def push(self, through: bool = True) -> None:
        """Move excess to room, straight or (`through`) over one node in between."""
        columns = np.flatnonzero(self.over_NX.any(0) & self.room_NX.any(0))
        if not len(columns):
            return
        over, room, residual = self.over_NX[:, columns], self.room_NX[:, columns], self.residual_NNX[:, :, columns]
        usable = np.asarray(np.any(residual, axis=2))
        for p, q in zip(*np.nonzero(usable), strict=True):
            _send(over[p], room[q], [(residual[p, q], residual[q, p])])
        for p in range(len(over) if through else 0):
            # The few columns in which p still has excess, in copies that stay in the cache.
            few = np.flatnonzero(over[p])
            if len(few):
                o, r, c = over[p, few], room[:, few], residual[:, :, few]
                usable = np.asarray(np.any(c, axis=2))
                for via, q in zip(*np.nonzero(usable), strict=True):
                    if usable[p, via] and p not in (via, q):
                        _send(o, r[q], [(c[p, via], c[via, p]), (c[via, q], c[q, via])])
                over[p, few], room[:, few], residual[:, :, few] = o, r, c
        self.over_NX[:, columns], self.room_NX[:, columns], self.residual_NNX[:, :, columns] = over, room, residual

    def reach(self) -> tuple[np.ndarray, np.ndarray]:
        """What could arrive at each node to be sent on, and what each could keep or send on; both [N, X]."""
        supply = self.over_NX + np.minimum(self.residual_NNX, self.over_NX[:, None]).sum(0)
        sink = self.room_NX + np.minimum(self.residual_NNX, self.room_NX[None]).sum(1)
        return supply, sink


def _send(over: np.ndarray, room: np.ndarray, edges: list[tuple[np.ndarray, np.ndarray]]) -> None:
    amount = np.minimum(over, room)
    for forward, _ in edges:
        np.minimum(amount, forward, out=amount)
    over -= amount
    room -= amount
    for forward, back in edges:
        forward -= amount
        back += amount
