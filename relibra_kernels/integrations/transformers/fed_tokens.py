"""Which tokens a forward of a Hugging Face model was fed: padding, packing and cache, in all forms that they take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...planner.errors import InputError, ShapeError


@dataclass(frozen=True)
class Fed:
    """The tokens of one forward of a model.

    token_ids: int64 [B, S], or None where embeddings were fed
    real:      bool [B, S]; False is padding
    cached:    tokens in the cache before them; None without a cache
    cache:     the cache itself
    packed:    lengths of the sequences that the one row is packed of, padding behind each included; None: not packed
    padded_behind: whether the last of these is not a sequence, but padding
    elsewhere: bool [B, S]; tokens that go to experts of their own, which no MoE layer here has (ERNIE-VL's images);
               None: no token does
    """

    token_ids: np.ndarray | None
    real: np.ndarray
    cached: int | None
    cache: Any = None
    packed: tuple[int, ...] | None = None
    padded_behind: bool = False
    elsewhere: np.ndarray | None = None


class CachedColumns:
    """Which of the columns that a cache holds are tokens, and not padding, of each row of a batch."""

    def __init__(self) -> None:
        self.count = 0
        self._real: list[np.ndarray] = []

    def add(self, real_BS: np.ndarray) -> None:
        self._real.append(real_BS)
        self.count += real_BS.shape[1]

    def cut(self, count: int) -> np.ndarray:
        """Keep the first `count` columns; int64 [B], how many tokens of each row that is."""
        self._real, self.count = [np.concatenate(self._real, 1)[:, :count]], count
        tokens: np.ndarray = self._real[0].sum(1)
        return tokens

    def select(self, rows: np.ndarray) -> None:
        self._real = [real[rows] for real in self._real]


def fed_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Fed:
    """From the arguments of a model's forward. Waits for the device."""
    ids: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
    shaped = ids if ids is not None else kwargs.get("inputs_embeds")
    if shaped is None or shaped.ndim < 2:
        raise ShapeError("the model's forward got neither input_ids [B, S] nor inputs_embeds [B, S, H]")
    batch, length = shaped.shape[:2]
    cache = next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")), None)
    cached = None if cache is None else int(cache.get_seq_length())
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    real = _real(mask, batch, length, cached or 0)
    packed, padded = _packed(kwargs, length, real) if batch == 1 and not cached else (None, False)
    token_ids = None if ids is None else ids.numpy(force=True)
    return Fed(token_ids, real, cached, cache, packed, padded, _elsewhere(kwargs, real))


def _elsewhere(kwargs: Mapping[str, Any], real: np.ndarray) -> np.ndarray | None:
    """Which tokens of an ERNIE-VL forward are images; None in other models."""
    kinds = kwargs.get("moe_mm_token_type_ids")
    if not isinstance(kinds, Tensor) or kinds.numel() != real.size or not kinds.any():
        return None
    images: np.ndarray = kinds.bool().numpy(force=True)
    return images.reshape(real.shape)


def cache_of(outputs: Any) -> Any:
    """The cache that a forward returned, or None."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple) else ()
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def _real(mask: Any, batch: int, length: int, cached: int) -> np.ndarray:
    """bool [B, S]: which tokens are no padding.

    mask: over the tokens, over cache and tokens, or over pairs of them; or a dict of such masks.
    """
    if isinstance(mask, Mapping):
        mask = next((mask[key] for key in ("full_attention", *mask) if mask.get(key) is not None), None)
    if not isinstance(mask, Tensor):
        return np.ones((batch, length), bool)
    columns = cached + np.arange(length)
    if mask.shape[-1] < cached + length:  # of a window that the cache keeps
        columns = mask.shape[-1] - length + np.arange(length)
    if columns.min(initial=0) < 0 or mask.ndim not in (2, 3, 4):
        raise ShapeError(f"attention_mask has shape {tuple(mask.shape)}, but {length} tokens were fed after {cached}")
    if mask.ndim == 2:
        real = mask[:, columns].bool().numpy(force=True)
        return np.broadcast_to(real, (batch, length)).copy()
    pairs = mask if mask.ndim == 3 else mask[:, 0]
    seen = pairs if pairs.dtype == torch.bool else pairs > torch.finfo(pairs.dtype).min / 2
    attends: np.ndarray = seen[:, -length:].numpy(force=True)
    itself = attends[:, np.arange(length), columns]
    ahead = (attends & (np.arange(attends.shape[2]) > columns[:, None])).any(2)  # rows of padding are opened up
    return np.broadcast_to(itself & ~ahead, (batch, length)).copy()


def _packed(kwargs: Mapping[str, Any], length: int, real: np.ndarray) -> tuple[tuple[int, ...] | None, bool]:
    """Lengths of the sequences in one row, from the offsets or the positions that attention is given, and whether the
    last one is padding."""
    bounds = next((kwargs[key] for key in ("cu_seq_lens_q", "cu_seqlens") if kwargs.get(key) is not None), None)
    if bounds is not None:
        edges = bounds.numpy(force=True).astype(np.int64).reshape(-1)
        if edges[0] != 0 or (np.diff(edges) < 0).any() or edges[-1] > length:
            raise InputError(f"cu_seq_lens_q is {edges.tolist()[:8]}, but must rise from 0 to at most {length} tokens")
        padded = edges[-1] < length
        return tuple(np.diff(np.append(edges, length) if padded else edges).tolist()), bool(padded)
    positions = kwargs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or not real.all():
        return None, False
    starts = np.flatnonzero(positions[0].numpy(force=True) == 0)
    if len(starts) <= 1 or starts[0] != 0:
        return None, False
    return tuple(np.diff(np.append(starts, length)).tolist()), False
