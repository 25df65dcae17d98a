"""RoutingTrace: which experts every token of a batch chose, as the rollout engine recorded it."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import FormatError, InputError, ReLibraError, ShapeError
from .files import load_npz, save_npz, scalar

_CHUNK = 1 << 18  # assignments looked at together: a few copies of them stay in the second-level cache


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Expert ids of every token of every sequence, checked once on construction.

    expert_ids:    int8, int16 or int32 [tokens, L, K]; a row of -1 is a token whose routing was not recorded
    offsets:       int64 [sequences + 1]; sequence i is the rows offsets[i] to offsets[i + 1], all of its tokens
    num_experts:   E; ids are 0 to E - 1
    moe_layer_ids: the model's layer number of each of the L layers
    """

    expert_ids: np.ndarray
    offsets: np.ndarray
    num_experts: int
    moe_layer_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        ids = np.asarray(self.expert_ids)
        if ids.ndim != 3 or ids.dtype not in (np.int8, np.int16, np.int32):
            raise ShapeError(
                f"expert_ids is {ids.dtype} of shape {ids.shape}, but must be int8, int16 or int32 [tokens, layers, k]"
            )
        if min(ids.shape[1:]) < 1:
            raise ShapeError(f"expert_ids has shape {ids.shape}, but needs at least one layer and one choice a token")
        offsets = np.asarray(self.offsets)
        if offsets.ndim != 1 or offsets.size < 1 or offsets.dtype.kind not in "iu":
            raise ShapeError(f"offsets is {offsets.dtype} {offsets.shape}, but must be integer [sequences + 1]")
        offsets = offsets.astype(np.int64)
        if offsets[0] != 0 or offsets[-1] != len(ids):
            raise InputError(
                f"offsets run from {offsets[0]} to {offsets[-1]}, but must run from 0 to the {len(ids)} tokens"
            )
        if (np.diff(offsets) < 0).any():
            raise InputError(f"offsets decrease at sequence {int(np.argmax(np.diff(offsets) < 0))}")
        experts = int(self.num_experts)
        if not ids.shape[2] <= experts <= np.iinfo(ids.dtype).max + 1:
            raise InputError(f"num_experts is {experts}, but must be {ids.shape[2]} (k) to what {ids.dtype} can hold")
        layers = tuple(int(layer) for layer in self.moe_layer_ids)
        if len(layers) != ids.shape[1] or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise InputError(f"moe_layer_ids is {layers}, but must be {ids.shape[1]} increasing layer numbers")
        _check_ids(ids, experts)
        for name, value in (("expert_ids", ids), ("offsets", offsets), ("num_experts", experts)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "moe_layer_ids", layers)

    @property
    def num_tokens(self) -> int:
        return len(self.expert_ids)

    @property
    def num_layers(self) -> int:
        return self.expert_ids.shape[1]

    @property
    def top_k(self) -> int:
        return self.expert_ids.shape[2]

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def unknown(self) -> np.ndarray:
        """bool [tokens]: whose routing was not recorded. Rows are all known or all unknown."""
        return self.expert_ids[:, 0, 0] < 0

    @property
    def only_last_tokens_unknown(self) -> bool:
        """Whether every unknown row is the last token of its sequence, which no later token attends to."""
        known = ~self.unknown
        starts, ends = self.offsets[:-1], self.offsets[1:]
        known[ends[ends > starts] - 1] = True
        return bool(known.all())

    def sequence(self, index: int) -> np.ndarray:
        """[n, L, K] view of one sequence's rows."""
        if not 0 <= index < self.num_sequences:
            raise InputError(f"sequence {index} does not exist: the trace has {self.num_sequences}")
        return self.expert_ids[self.offsets[index] : self.offsets[index + 1]]

    def select(self, sequence_indices: Sequence[int] | np.ndarray) -> "RoutingTrace":
        """A trace of these sequences, in this order."""
        parts = [self.sequence(int(index)) for index in sequence_indices]
        chosen = object.__new__(RoutingTrace)  # rows that were checked already
        ids = np.concatenate(parts) if parts else self.expert_ids[:0]
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        for name, value in (("expert_ids", ids), ("offsets", offsets)):
            object.__setattr__(chosen, name, value)
        object.__setattr__(chosen, "num_experts", self.num_experts)
        object.__setattr__(chosen, "moe_layer_ids", self.moe_layer_ids)
        return chosen

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .npz file without pickles."""
        save_npz(
            path,
            expert_ids=self.expert_ids,
            offsets=self.offsets,
            num_experts=np.asarray(self.num_experts, np.int64),
            moe_layer_ids=np.asarray(self.moe_layer_ids, np.int64),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], num_experts: int | None = None) -> "RoutingTrace":
        """Read a .npz file. `num_experts` is for files that lack it, and must agree with files that have it."""
        arrays = load_npz(path, ("expert_ids", "offsets"), ("num_experts", "moe_layer_ids"))
        if "num_experts" in arrays:
            recorded = scalar(arrays, "num_experts", path)
            if not isinstance(recorded, np.integer):
                raise FormatError(f"{os.fspath(path)}: num_experts is {recorded!r}, but must be an integer")
            recorded = int(recorded)
            if num_experts is not None and num_experts != recorded:
                raise InputError(f"num_experts is {num_experts}, but {os.fspath(path)} was recorded with {recorded}")
            num_experts = recorded
        if num_experts is None:
            raise FormatError(f"{os.fspath(path)}: does not say num_experts; give it (--num-experts)")
        ids = arrays["expert_ids"]
        layers = arrays.get("moe_layer_ids", np.arange(ids.shape[1] if ids.ndim > 1 else 0))
        try:
            return cls(ids, arrays["offsets"], num_experts, tuple(int(x) for x in np.ravel(layers)))
        except ReLibraError as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from None


def id_dtype(num_experts: int) -> type[np.signedinteger]:
    """The narrowest dtype of expert ids that holds -1 to num_experts - 1."""
    return next(dtype for dtype in (np.int8, np.int16, np.int32) if num_experts - 1 <= np.iinfo(dtype).max)


def token_chunks(num_tokens: int, per_token: int) -> Iterator[slice]:
    """Slices of whole tokens, of about _CHUNK assignments each."""
    step = max(1, _CHUNK // per_token)
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


def _check_ids(ids: np.ndarray, num_experts: int) -> None:
    """Ids in range, no expert twice for one token, no token that is known in part."""
    tokens, layers, top_k = ids.shape
    for part in token_chunks(tokens, layers * top_k):
        chunk = ids[part]
        low, high = int(chunk.min()), int(chunk.max())
        if low < -1 or high >= num_experts:
            bad = (chunk < -1) | (chunk >= num_experts)
            t, layer, k = (int(x[0]) for x in np.nonzero(bad))
            raise InputError(
                f"expert_ids of token {part.start + t}, layer {layer} names expert {chunk[t, layer, k]}, "
                f"but there are {num_experts} experts (-1: not recorded)"
            )
        if low < 0:
            flat = chunk.reshape(len(chunk), -1) < 0
            unknown = flat.all(1)
            partly = flat.any(1) & ~unknown
            if partly.any():
                t = part.start + int(np.argmax(partly))
                raise InputError(f"expert_ids of token {t} are -1 in part: a token is known in every layer, or in none")
            chunk = chunk[~unknown]
        by_choice = np.ascontiguousarray(chunk.reshape(-1, top_k).T)  # [K, n * L]: comparisons run over long rows
        twice = np.zeros(by_choice.shape[1], bool)
        for k in range(1, top_k):
            for other in range(k):
                twice |= by_choice[k] == by_choice[other]
        if twice.any():
            row = int(np.argmax(twice))
            known = np.arange(part.start, part.stop)[~unknown] if low < 0 else np.arange(part.start, part.stop)
            raise InputError(
                f"expert_ids of token {known[row // layers]}, layer {row % layers} are {by_choice[:, row].tolist()}: "
                f"an expert is chosen twice (a row of zeros is padding, not routing)"
            )
