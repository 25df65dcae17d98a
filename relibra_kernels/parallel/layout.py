"""Which micro-batch, rank and place in the input every token of a batch has: packed, padded, dynamically sized."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..planner import RoutingTrace, load_table
from ..planner.errors import InputError, ShapeError


@dataclass(frozen=True)
class BatchLayout:
    """Where the sequences of a whole batch are trained.

    rank_of_sequence, micro_batch_of_sequence: int [sequences].
    lengths: int [sequences], tokens of each.

    Within a (micro-batch, rank), sequences stand in the order of the batch, which is the order of the rows of a trace.
    """

    rank_of_sequence: np.ndarray
    micro_batch_of_sequence: np.ndarray
    lengths: np.ndarray
    num_ranks: int
    num_micro_batches: int

    def __post_init__(self) -> None:
        shape = np.shape(self.lengths)
        for name, limit in (
            ("rank_of_sequence", self.num_ranks),
            ("micro_batch_of_sequence", self.num_micro_batches),
            ("lengths", None),
        ):
            value = np.asarray(getattr(self, name))
            if value.ndim != 1 or value.shape != shape or (value.size and value.dtype.kind not in "iu"):
                raise ShapeError(f"{name} is {value.dtype} {value.shape}; it must be integers {shape}, as lengths has")
            if value.size and (value.min() < 0 or (limit is not None and value.max() >= limit)):
                raise InputError(f"{name} holds {value.min()}..{value.max()}; it must lie in 0..{limit or '...'} - 1")
            object.__setattr__(self, name, value.astype(np.int64))

    @classmethod
    def balanced(
        cls, lengths: Sequence[int] | np.ndarray, num_ranks: int, tokens_per_micro_batch: int
    ) -> "BatchLayout":
        """Dynamically sized micro-batches: as few as hold at most so many tokens a rank, filled longest first.

        Every rank gets the same number of micro-batches. Deterministic.
        Raises: InputError where one sequence is longer.
        """
        lengths = np.asarray(lengths, np.int64)
        if lengths.size and lengths.max() > tokens_per_micro_batch:
            raise InputError(
                f"tokens_per_micro_batch is {tokens_per_micro_batch}; it must hold the longest sequence, "
                f"which has {lengths.max()} tokens"
            )
        micro_batches = max(1, -(-int(lengths.sum()) // (num_ranks * max(tokens_per_micro_batch, 1))))
        order = np.argsort(-lengths, kind="stable")
        while True:
            filled = np.zeros(micro_batches * num_ranks, np.int64)
            bin_of = np.zeros(len(lengths), np.int64)
            for sequence in order:
                best = int(filled.argmin())
                bin_of[sequence] = best
                filled[best] += lengths[sequence]
            if filled.max(initial=0) <= tokens_per_micro_batch:
                micro_batch, rank = np.divmod(bin_of, num_ranks)
                return cls(rank, micro_batch, lengths, num_ranks, micro_batches)
            micro_batches += 1

    def sequences(self, micro_batch: int, rank: int) -> np.ndarray:
        """int64: the sequences of one rank in one micro-batch, in the order of its rows."""
        here = (self.micro_batch_of_sequence == micro_batch) & (self.rank_of_sequence == rank)
        return np.flatnonzero(here)

    def of_rank(self, rank: int) -> np.ndarray:
        """int64: all sequences of a rank, which its trace holds in this order."""
        return np.flatnonzero(self.rank_of_sequence == rank)

    def place_of_token(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(micro-batch, rank, row) of every token of the batch, int64 [tokens] each."""
        group = self.micro_batch_of_sequence * self.num_ranks + self.rank_of_sequence
        start = np.zeros(len(self.lengths), np.int64)
        for index in np.unique(group):
            here = np.flatnonzero(group == index)
            start[here] = np.cumsum(self.lengths[here]) - self.lengths[here]
        first = np.cumsum(self.lengths) - self.lengths
        within = np.arange(int(self.lengths.sum())) - np.repeat(first, self.lengths)
        micro_batch, rank = np.divmod(np.repeat(group, self.lengths), self.num_ranks)
        return micro_batch, rank, np.repeat(start, self.lengths) + within

    def packed_rows(self, micro_batch: int, rank: int) -> np.ndarray:
        """`rows` for `ep.micro_batch` where sequences are packed one after the other, without padding."""
        return np.arange(int(self.lengths[self.sequences(micro_batch, rank)].sum()))

    def padded_rows(self, micro_batch: int, rank: int, width: int | None = None, left: bool = False) -> np.ndarray:
        """`rows` for `ep.micro_batch` where sequences are padded to one width, at the end or on the left: [B * width].

        Raises: InputError where `width` is less than the longest sequence.
        """
        lengths = self.lengths[self.sequences(micro_batch, rank)]
        longest = int(lengths.max(initial=0))
        width = longest if width is None else width
        if width < longest:
            raise InputError(f"width is {width}; it must be at least the longest sequence's {longest} tokens")
        column = np.arange(width) - (width - lengths[:, None] if left else 0)
        row = column + (np.cumsum(lengths) - lengths)[:, None]
        return np.where((column >= 0) & (column < lengths[:, None]), row, -1).reshape(-1)

    def loads(self, trace: RoutingTrace) -> np.ndarray:
        """int32 [L, M, R, E]: the load table of the whole batch, from a trace of all of its sequences."""
        return load_table(
            trace, self.micro_batch_of_sequence, self.rank_of_sequence, self.num_micro_batches, self.num_ranks
        )
