"""Megatron: which tokens of its sequences a rank's MoE layers get under context and sequence parallelism.

Context parallelism gives a rank some chunks of every sequence; sequence parallelism gives each rank of a tensor
parallel group a part of those. The expert parallel group spans all of them: each rank plans and replays its own tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from ..parallel.routed_batch import RoutedBatch
from ..planner import RoutingTrace
from ..planner.errors import InputError, ShapeError
from ..planner.trace_report import LAST_TOKEN
from ..planner.trace_rules import checked_numbers

__all__ = ["TokenShare"]


@dataclass(frozen=True)
class TokenShare:
    """The share of a rank in the tokens of its sequences.

    context_rank, context_size:   of context parallelism.
    sequence_rank, sequence_size: of sequence parallelism: the tensor parallel ones where it is on, else 0 and 1.
    zigzag: of context parallelism: whether a rank has chunks `rank` and `2 * size - 1 - rank` of 2 * size, as Megatron
        cuts, or chunk `rank` of `size`.

    Raises: InputError where a rank is not one of its size.
    """

    context_rank: int = 0
    context_size: int = 1
    sequence_rank: int = 0
    sequence_size: int = 1
    zigzag: bool = True

    def __post_init__(self) -> None:
        for name in ("context", "sequence"):
            rank, size = getattr(self, f"{name}_rank"), getattr(self, f"{name}_size")
            if not all(isinstance(value, int | np.integer) for value in (rank, size)) or not 0 <= rank < size:
                raise InputError(f"{name}_rank is {rank!r}; it must be one of the {size!r} ranks of {name}_size")

    @classmethod
    def of_this_rank(cls, config: Any, groups: Any = None) -> "TokenShare":
        """From a `TransformerConfig`, and `parallel_state` or a `ProcessGroupCollection` with cp and tp."""
        if groups is None:
            from megatron.core import parallel_state

            context = parallel_state.get_context_parallel_group()
            tensor = parallel_state.get_tensor_model_parallel_group()
        else:
            context, tensor = groups.cp, groups.tp
        sequence = (dist.get_rank(tensor), dist.get_world_size(tensor)) if config.sequence_parallel else (0, 1)
        return cls(dist.get_rank(context), dist.get_world_size(context), *sequence)

    def padded_rows(self, trace: RoutingTrace, sequence_length: int) -> np.ndarray:
        """int64 [tokens fed]: trace rows of this rank's share of right-padded [sequence, batch] input, -1 for padding.

        Raises: InputError where `sequence_length`, of the whole input, cannot be cut up, or is less than a sequence.
        """
        lengths = np.diff(trace.offsets)
        multiple = int(np.lcm(self._chunks, self.context_size * self.sequence_size))
        if sequence_length % multiple or sequence_length < lengths.max(initial=0):
            raise InputError(
                f"sequence_length is {sequence_length}; it must be a multiple of {multiple} that holds the longest "
                f"sequence, of {lengths.max(initial=0)} tokens"
            )
        position = self._of_sequence_parallel(self._of_context(np.arange(sequence_length)))[:, None]
        return np.where(position < lengths, trace.offsets[:-1] + position, -1).reshape(-1)

    def packed_rows(self, trace: RoutingTrace, *, each: int | None = None, total: int = 1) -> np.ndarray:
        """int64 [tokens fed]: trace rows of this rank's share of packed sequences ("thd"), -1 for padding.

        Args:
            each: every sequence is padded to a multiple of it; None: as context parallelism needs it. verl pads to
                2 * context * tensor parallel size (without context parallelism to the tensor parallel size).
            total: what a context parallel rank has of all of them is padded at its end to a multiple of it, and of
                `sequence_size`. slime: tensor parallel size * `data_pad_size_multiplier`.

        Raises: InputError where `each` does not divide into the chunks of context parallelism.
        """
        each = self._chunks if each is None else each
        if each < 1 or each % self._chunks or total < 1:
            raise InputError(f"each is {each} and total {total}; each must be a multiple of {self._chunks} chunks")
        shares = [np.zeros(0, np.int64)]
        for start, length in zip(trace.offsets[:-1], np.diff(trace.offsets), strict=True):
            position = self._of_context(np.arange(-(-length // each) * each))
            shares.append(np.where(position < length, start + position, -1))
        rows = np.concatenate(shares)
        whole = int(np.lcm(total, self.sequence_size))
        return self._of_sequence_parallel(np.pad(rows, (0, -len(rows) % whole), constant_values=-1))

    def of_batch(self, batch: RoutedBatch, rows_of: Callable[[RoutingTrace], np.ndarray]) -> RoutedBatch:
        """What this rank plans and replays: its tokens of each micro-batch, with `rows`, for `ep.micro_batch(m)`.

        Args:
            batch: the whole sequences that this rank trains on together with the others of its context and tensor
                parallel groups; of one rank, without `rows`.
            rows_of: of the trace of one micro-batch: `padded_rows` or `packed_rows`, as the model is fed.

        Where a sequence goes on on another rank, one unknown token that is never fed stands after its part: the last
        of a sequence is the one that needs no expert.

        Raises: InputError, ShapeError.
        """
        if batch.num_ranks > 1 or batch.rows is not None:
            raise InputError(
                f"batch is of {batch.num_ranks} ranks, rows {'given' if batch.rows is not None else 'None'}; it must "
                "be what one rank has, without rows"
            )
        trace, parts, lengths, rows, of_micro_batch = batch.trace, [], [], [], []
        for m in range(batch.num_micro_batches):
            sequences = batch.sequences(m)
            part = trace.select(sequences)
            fed = checked_numbers(rows_of(part), "rows_of(trace)").astype(np.int64)
            own = np.sort(fed[fed >= 0])
            if len(own) and (own[-1] >= part.num_tokens or (np.diff(own) == 0).any()):
                raise ShapeError(f"rows_of(trace) names a row twice, or one beyond the {part.num_tokens} of the trace")
            token = np.full(part.num_tokens + 1, -1, np.int64)  # of the share, by row of the micro-batch; -1 stays -1
            count = 0
            for index, sequence in enumerate(sequences):
                start, end = part.offsets[index], part.offsets[index + 1]
                mine = own[(own >= start) & (own < end)]
                token[mine] = count + np.arange(len(mine))
                goes_on = bool(len(mine)) and mine[-1] != end - 1
                parts.append(trace.offsets[sequence] + mine - start)
                parts.append(np.full(int(goes_on), -1))
                lengths.append(len(mine) + int(goes_on))
                count += lengths[-1]
                of_micro_batch.append(m)
            rows.append(token[fed])
        taken = np.concatenate([np.zeros(0, np.int64), *parts])
        reasons = np.where(taken < 0, LAST_TOKEN, trace.reasons[taken]) if len(trace.reasons) else trace.reasons
        share = RoutingTrace(
            trace.rows(taken),
            np.cumsum([0, *lengths]),
            trace.num_experts,
            trace.moe_layer_ids,
            unknown=reasons.astype(np.uint8),
        )
        return RoutedBatch(share, np.array(of_micro_batch, np.int64), batch.num_micro_batches, rows)

    @property
    def _chunks(self) -> int:
        return self.context_size * (2 if self.zigzag and self.context_size > 1 else 1)

    def _of_context(self, positions: np.ndarray) -> np.ndarray:
        chunks = positions.reshape(self._chunks, -1)
        if not self.zigzag or self.context_size == 1:
            return chunks[self.context_rank]
        return np.concatenate([chunks[self.context_rank], chunks[self._chunks - 1 - self.context_rank]])

    def _of_sequence_parallel(self, positions: np.ndarray) -> np.ndarray:
        return positions.reshape(self.sequence_size, -1)[self.sequence_rank]
