"""RoutedBatch: the recorded routing of one batch, and where each of its sequences is trained."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..planner import RoutingTrace, load_table
from ..planner.errors import InputError, ShapeError
from ..planner.trace_rules import checked_numbers


@dataclass(frozen=True, eq=False)
class RoutedBatch:
    """A trace, and the micro-batch and rank that train each of its sequences. One object, which is passed whole.

    It is either the whole batch of an expert-parallel group (`num_ranks` > 1), or what one rank has of it.
    `of_rank(r)` makes the second from the first. Within a micro-batch of a rank, sequences stand in the order of
    `order`; the rows of that micro-batch are their tokens, one sequence after the other.

    trace:                    the recorded routing of all sequences
    micro_batch_of_sequence:  int64 [sequences]
    num_micro_batches:        the same on every rank
    rows:     for each micro-batch, int [tokens of the model's input]: which row of the micro-batch each token is, -1
              for padding. None: the input is exactly the rows. Of one rank only.
    rank_of_sequence:         int64 [sequences]; None: all sequences are of one rank
    num_ranks:                ranks of the group
    order:                    int64 [sequences], a permutation; None: the order of the trace

    Raises: ShapeError, InputError where an array has another shape, or values out of range.
    """

    trace: RoutingTrace
    micro_batch_of_sequence: np.ndarray
    num_micro_batches: int
    rows: Sequence[np.ndarray | None] | None = None
    rank_of_sequence: np.ndarray | None = None
    num_ranks: int = 1
    order: np.ndarray | None = None
    lengths: np.ndarray = field(init=False, repr=False)  # int64 [sequences], tokens of each
    _of_rank: "dict[int, RoutedBatch]" = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        count = self.trace.num_sequences
        object.__setattr__(self, "lengths", np.diff(self.trace.offsets).astype(np.int64))
        for name, default in (("rank_of_sequence", np.zeros(count, np.int64)), ("order", np.arange(count))):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name in ("num_micro_batches", "num_ranks"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 1:
                raise InputError(f"{name} is {value!r}; it must be an integer of at least 1")
            object.__setattr__(self, name, int(value))
        for name, limit in (
            ("micro_batch_of_sequence", self.num_micro_batches),
            ("rank_of_sequence", self.num_ranks),
            ("order", count),
        ):
            value = np.asarray(getattr(self, name))
            if value.shape != (count,) or (count and value.dtype.kind not in "iu"):
                raise ShapeError(f"{name} is {value.dtype} {value.shape}; it must be integers [{count}], the sequences")
            if count and (value.min() < 0 or value.max() >= limit):
                raise InputError(f"{name} holds {value.min()}..{value.max()}; it must lie in 0..{limit - 1}")
            object.__setattr__(self, name, value.astype(np.int64))
        if len(np.unique(self._order)) != count:
            raise InputError("order names a sequence twice; it must be a permutation of the sequences")
        if self.rows is not None and (self.num_ranks > 1 or len(self.rows) != self.num_micro_batches):
            raise InputError(
                f"rows are for {len(self.rows)} micro-batches; they must be for the {self.num_micro_batches} of "
                "one rank"
            )

    @classmethod
    def from_micro_batches(cls, trace: RoutingTrace, micro_batches: Sequence[Sequence[Sequence[int]]]) -> "RoutedBatch":
        """The batch of a group whose sequences are dealt out already.

        Args:
            micro_batches: `micro_batches[rank][m]`, the sequences of the trace that the rank trains on in micro-batch
                m, in the order in which it does.

        Raises: InputError where ranks have different numbers of micro-batches, or a sequence is dealt out twice or
            never.
        """
        micro_batches = _dealt(micro_batches, "micro_batches")
        counts = {len(parts) for parts in micro_batches}
        if len(counts) != 1 or 0 in counts:
            raise InputError(f"ranks have {sorted(counts)} micro-batches; all must have the same number, at least one")
        micro_batch, rank = np.full(trace.num_sequences, -1), np.full(trace.num_sequences, -1)
        order = []
        for r, parts in enumerate(micro_batches):
            for m, part in enumerate(parts):
                for sequence in part:
                    if not 0 <= sequence < trace.num_sequences or rank[sequence] >= 0:
                        raise InputError(
                            f"micro_batches[{r}][{m}] has sequence {sequence}; it must be one of "
                            f"0..{trace.num_sequences - 1} that no other micro-batch has"
                        )
                    micro_batch[sequence], rank[sequence] = m, r
                    order.append(sequence)
        if (rank < 0).any():
            raise InputError(f"micro_batches leave out sequence {int(np.argmax(rank < 0))}")
        return cls(
            trace,
            micro_batch,
            counts.pop(),
            rank_of_sequence=rank,
            num_ranks=len(micro_batches),
            order=np.array(order, np.int64),
        )

    @classmethod
    def from_token_budget(cls, trace: RoutingTrace, num_ranks: int, tokens_per_micro_batch: int) -> "RoutedBatch":
        """Dynamically sized micro-batches: as few as hold at most so many tokens a rank, filled longest first.

        Deterministic; every rank gets the same number. Raises: InputError where one sequence is longer.
        """
        lengths = np.diff(trace.offsets)
        if tokens_per_micro_batch < max(1, lengths.max(initial=0)):
            raise InputError(
                f"tokens_per_micro_batch is {tokens_per_micro_batch}; it must hold the longest sequence, "
                f"which has {lengths.max(initial=0)} tokens"
            )
        micro_batches = max(1, -(-int(lengths.sum()) // (num_ranks * tokens_per_micro_batch)))
        while True:
            filled = np.zeros(micro_batches * num_ranks, np.int64)
            bin_of = np.zeros(len(lengths), np.int64)
            for sequence in np.argsort(-lengths, kind="stable"):
                bin_of[sequence] = filled.argmin()
                filled[bin_of[sequence]] += lengths[sequence]
            if filled.max() <= tokens_per_micro_batch:
                micro_batch, rank = np.divmod(bin_of, num_ranks)
                return cls(trace, micro_batch, micro_batches, rank_of_sequence=rank, num_ranks=num_ranks)
            micro_batches += 1

    @classmethod
    def from_verl(cls, trace: RoutingTrace, num_ranks: int, micro_batch_size_per_gpu: int) -> "RoutedBatch":
        """As verl deals out a batch with `use_dynamic_bsz=False`: consecutive sequences to each rank, and of those
        consecutive ones to each micro-batch.

        Raises: InputError where the sequences do not divide.
        """
        count = trace.num_sequences
        whole = isinstance(micro_batch_size_per_gpu, int | np.integer)
        if (
            not whole
            or micro_batch_size_per_gpu < 1
            or count % num_ranks
            or (count // num_ranks) % micro_batch_size_per_gpu
        ):
            raise InputError(
                f"micro_batch_size_per_gpu is {micro_batch_size_per_gpu!r}; {count} sequences must divide over "
                f"{num_ranks} ranks in micro-batches of it"
            )
        each = count // num_ranks
        rank, within = np.divmod(np.arange(count), max(each, 1))
        return cls(
            trace,
            within // micro_batch_size_per_gpu,
            max(1, each // micro_batch_size_per_gpu),
            rank_of_sequence=rank,
            num_ranks=num_ranks,
        )

    @classmethod
    def from_slime(
        cls,
        trace: RoutingTrace,
        partition_of_rank: Sequence[Sequence[int]],
        micro_batch_indices_of_rank: Sequence[Sequence[Sequence[int]]],
    ) -> "RoutedBatch":
        """As slime deals out a rollout.

        Args:
            partition_of_rank: for every rank, which samples of the rollout it has.
            micro_batch_indices_of_rank: for every rank, slime's `micro_batch_indices`: positions in its partition.

        Raises: InputError as in `from_micro_batches`.
        """
        micro_batch_indices_of_rank = _dealt(micro_batch_indices_of_rank, "micro_batch_indices_of_rank")
        partition_of_rank = _dealt([partition_of_rank], "partition_of_rank")[0]
        if len(partition_of_rank) != len(micro_batch_indices_of_rank):
            raise InputError(
                f"partition_of_rank is for {len(partition_of_rank)} ranks and micro_batch_indices_of_rank for "
                f"{len(micro_batch_indices_of_rank)}; they must be for the same"
            )
        dealt = []
        for rank, (samples, parts) in enumerate(zip(partition_of_rank, micro_batch_indices_of_rank, strict=True)):
            for index in (i for part in parts for i in part):
                if not 0 <= index < len(samples):
                    raise InputError(
                        f"micro_batch_indices_of_rank[{rank}] has {index}; it must lie in 0..{len(samples) - 1}, "
                        "positions in the rank's partition"
                    )
            dealt.append([[samples[i] for i in part] for part in parts])
        return cls.from_micro_batches(trace, dealt)

    def of_rank(self, rank: int) -> "RoutedBatch":
        """What one rank trains on: its sequences in `order`, as its own trace."""
        if not 0 <= rank < self.num_ranks:
            raise InputError(f"rank is {rank}; the batch is for the ranks 0..{self.num_ranks - 1}")
        if self.num_ranks == 1 and (self._order == np.arange(len(self._order))).all():
            return self
        if rank not in self._of_rank:  # the same object again, so that what was counted for a plan serves its batch
            mine = self._order[self._ranks[self._order] == rank]
            self._of_rank[rank] = RoutedBatch(
                self.trace.select(mine), self.micro_batch_of_sequence[mine], self.num_micro_batches, self.rows
            )
        return self._of_rank[rank]

    @cached_property
    def live(self) -> np.ndarray:
        """bool [tokens]: tokens that a router must choose experts for: unknown, and not the last of their sequence.

        No later token attends to the last one and it has no loss, so it visits no expert where it is unknown.
        """
        live = self.trace.unknown.copy()
        live[self.trace.offsets[1:][self.lengths > 0] - 1] = False
        return live

    @cached_property
    def live_of_sequence(self) -> np.ndarray:
        """int64 [sequences]: how many of its tokens are `live`."""
        before = np.concatenate([[0], np.cumsum(self.live)])
        return before[self.trace.offsets[1:]] - before[self.trace.offsets[:-1]]

    def needed(self, micro_batch: int) -> np.ndarray:
        """bool [rows of a micro-batch of this rank]: rows that a model must be fed: known, or routed live."""
        offsets = self.trace.offsets
        parts = [slice(offsets[i], offsets[i + 1]) for i in self.sequences(micro_batch)]
        return np.concatenate([np.zeros(0, bool), *(~self.trace.unknown[p] | self.live[p] for p in parts)])

    def sequences(self, micro_batch: int, rank: int = 0) -> np.ndarray:
        """int64: the sequences of one rank in one micro-batch, in the order of its rows."""
        here = (self.micro_batch_of_sequence == micro_batch) & (self._ranks == rank)
        return self._order[here[self._order]]

    def trace_of(self, micro_batch: int) -> RoutingTrace:
        """The sequences of one micro-batch of this rank, in the order of its rows."""
        return self.trace.select(self.sequences(micro_batch))

    def padded_rows(self, micro_batch: int, rank: int = 0, width: int | None = None, left: bool = False) -> np.ndarray:
        """The `rows` of an input whose sequences are padded to one width, at the end or on the left: [B * width].

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

    def loads(self) -> np.ndarray:
        """int32 [L, M, R, E]: the load table by source rank."""
        where = self.micro_batch_of_sequence, self._ranks
        return load_table(self.trace, *where, self.num_micro_batches, self.num_ranks)

    @property
    def _ranks(self) -> np.ndarray:
        assert self.rank_of_sequence is not None
        return self.rank_of_sequence

    @property
    def _order(self) -> np.ndarray:
        assert self.order is not None
        return self.order


def routed_batch(
    batch: "RoutedBatch | RoutingTrace",
    micro_batch_of_sequence: np.ndarray | Iterable[int] | None,
    num_micro_batches: int | None,
    rank: int,
    num_ranks: int,
) -> RoutedBatch:
    """What `rank` has of a batch that was given as a `RoutedBatch`, or as the short form for whole sequences.

    Raises: InputError where the batch is for another number of ranks, or the short form is incomplete.
    """
    if isinstance(batch, RoutedBatch):
        if micro_batch_of_sequence is not None or num_micro_batches not in (None, batch.num_micro_batches):
            raise InputError("micro_batch_of_sequence and num_micro_batches are part of a RoutedBatch; give it alone")
        if batch.num_ranks not in (1, num_ranks):
            raise InputError(f"the routed batch is for {batch.num_ranks} ranks; the group has {num_ranks}")
        return batch.of_rank(rank if batch.num_ranks > 1 else 0)
    if not isinstance(batch, RoutingTrace):
        raise InputError(f"batch is a {type(batch).__name__}; it must be a RoutedBatch or a RoutingTrace")
    if micro_batch_of_sequence is None or num_micro_batches is None:
        raise InputError("micro_batch_of_sequence or num_micro_batches is None; a trace needs both")
    return RoutedBatch(batch, np.asarray(micro_batch_of_sequence), num_micro_batches)


def _dealt(value: Any, name: str) -> list[list[list[int]]]:
    """Numbers of sequences by rank and micro-batch. Raises: InputError where they are none (1.5 must not become 1)."""
    try:
        return [
            [checked_numbers(part, f"{name}[{r}][{m}]").tolist() for m, part in enumerate(parts)]
            for r, parts in enumerate(value)
        ]
    except TypeError:
        raise InputError(f"{name} is {str(value)[:60]}, but must have a list for each rank and micro-batch") from None
