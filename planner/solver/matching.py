"""Which rank (or node) each new group of experts gets, so that as few experts as possible change theirs."""

import numpy as np


def match_labels(overlap_BPQ: np.ndarray) -> np.ndarray:
    """int64 [B, P]: the label (rank or node) of every new group, each used once, with the largest total overlap.

    overlap_BPQ: for each of B problems, what new group p and the present group of label q have in common.

    The Hungarian method with potentials (rows added one by one along shortest augmenting paths), for all B problems in
    step. Integers throughout.
    """
    problems, size, _ = overlap_BPQ.shape
    cost = overlap_BPQ.max(initial=0) - overlap_BPQ.astype(np.int64)
    far = np.int64(1) << 60
    at = np.arange(problems)
    row_price = np.zeros((problems, size + 1), np.int64)
    column_price = np.zeros((problems, size + 1), np.int64)
    row_of = np.full((problems, size + 1), size)  # row matched to each column; `size` is none, and a column to start at
    for row in range(size):
        row_of[:, size] = row
        column = np.full(problems, size)
        slack = np.full((problems, size), far)
        came_from = np.full((problems, size), size)
        seen = np.zeros((problems, size + 1), np.bool_)
        searching = row_of[at, column] < size
        while searching.any():
            b = np.flatnonzero(searching)
            seen[b, column[b]] = True
            current = row_of[b, column[b]]
            reduced = cost[b, current] - row_price[b, current][:, None] - column_price[b, :size]
            closer = ~seen[b, :size] & (reduced < slack[b])
            slack[b] = np.where(closer, reduced, slack[b])
            came_from[b] = np.where(closer, column[b][:, None], came_from[b])
            open_slack = np.where(seen[b, :size], far, slack[b])
            nearest = open_slack.argmin(1)
            step = open_slack[np.arange(len(b)), nearest]
            # Rows on the path so far rise by the step, their columns fall by it, the others come nearer.
            for j in range(size + 1):
                on_path = seen[b, j]
                row_price[b[on_path], row_of[b[on_path], j]] += step[on_path]
                column_price[b[on_path], j] -= step[on_path]
            slack[b] = np.where(seen[b, :size], slack[b], slack[b] - step[:, None])
            column[b] = nearest
            searching[b] = row_of[b, nearest] < size
        while (column < size).any():  # turn the path around
            b = np.flatnonzero(column < size)
            before = came_from[b, column[b]]
            row_of[b, column[b]] = row_of[b, before]
            column[b] = before
        row_of[:, size] = size
    label = np.empty((problems, size), np.int64)
    np.put_along_axis(label, row_of[:, :size], np.broadcast_to(np.arange(size), (problems, size)), 1)
    return label
