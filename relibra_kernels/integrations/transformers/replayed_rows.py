"""Which rows of a trace each forward replays: from the tokens that it is fed to the recorded ids of every layer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...alignment import Alignment
from ...forwards import OpenForwards
from ...planner import RoutingTrace
from ...planner.errors import InputError
from .fed_tokens import Fed
from .moe_layers import MoeLayer


@dataclass(frozen=True)
class ReplayedForward:
    """What one forward replays.

    indices: int64 [T, K] of each layer, on its device; -1 is routed live
    """

    indices: tuple[Tensor, ...]
    all_known: bool


class Feeder(OpenForwards):
    """The forwards of one replay: `current` is the `ReplayedForward` that runs now."""

    current: ReplayedForward | None

    def __init__(self, trace: RoutingTrace, layers: list[MoeLayer], token_ids: Sequence[Sequence[int]] | None):
        self._trace, self._devices = trace, [layer.device for layer in layers]
        self.layer_of_router = {id(layer.router): index for index, layer in enumerate(layers)}
        self._lengths = np.diff(trace.offsets)
        self._token_ids: np.ndarray | None = None
        if token_ids is not None:
            lengths = [len(ids) for ids in token_ids]
            if lengths != self._lengths.tolist():
                raise InputError(
                    f"token_ids have the lengths {lengths[:8]}, but the trace's sequences {self._lengths.tolist()[:8]}"
                )
            parts = [np.asarray(ids, np.int64) for ids in token_ids]
            self._token_ids = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        self._done = np.zeros(trace.num_sequences, np.int64)  # tokens of each sequence that a cache holds
        self.current = None
        self.alignment: Alignment | None = None
        self.on_resumed: Callable[[], Any] = lambda: None

    def resumed(self) -> None:
        self.on_resumed()

    def feed(self, fed: Fed) -> np.ndarray:
        """Get ready for a forward that is fed these tokens. Returns their rows in the trace, int64 [B * S]."""
        rows = self._whole(fed) if fed.cached is None else self._continued(fed)
        if self._token_ids is not None and fed.token_ids is not None:
            self._check_token_ids(fed, rows)
        self.use_rows(rows.reshape(-1) if fed.elsewhere is None else rows[~fed.elsewhere])
        return rows.reshape(-1)

    def use_rows(self, rows_T: np.ndarray) -> None:
        ids_TLK = self._trace.rows(rows_T)
        ids = torch.from_numpy(np.ascontiguousarray(ids_TLK.transpose(1, 0, 2), np.int64))
        indices = tuple(ids[layer].to(device) for layer, device in enumerate(self._devices))
        self.current = ReplayedForward(indices, bool((ids_TLK >= 0).all()))

    def _whole(self, fed: Fed) -> np.ndarray:
        """Rows [B, S] where a forward is fed every sequence from its first to its last token."""
        per_row = fed.real.sum(1)
        rows = np.full(fed.real.shape, -1, np.int64)
        if per_row.tolist() == self._lengths.tolist() and (fed.packed is None or len(per_row) != 1):
            rows[fed.real] = np.arange(self._trace.num_tokens)
        elif len(per_row) == 1 and fed.packed is not None and self._fits(fed, fed.packed):
            places = np.concatenate([[0], np.cumsum(fed.packed)])
            for start, length, row in zip(places, self._lengths, self._trace.offsets, strict=False):
                rows[0, start : start + length] = row + np.arange(length)
        elif per_row.tolist() == [self._trace.num_tokens] and fed.packed is None:
            rows[fed.real] = np.arange(self._trace.num_tokens)
        else:
            given = f"sequences of {list(fed.packed)[:8]}" if fed.packed else f"rows of {per_row.tolist()[:8]}"
            raise InputError(
                f"the forward was fed {given} tokens without padding, but the trace has sequences of "
                f"{self._lengths.tolist()[:8]}; feed them whole and in order, or say which trace row each token is "
                "(rows)"
            )
        return rows

    def _fits(self, fed: Fed, packed: tuple[int, ...]) -> bool:
        """Whether the trace's sequences lie in these, each padded to a common multiple, or padding follows the last."""
        own, tail = list(packed[: len(self._lengths)]), packed[len(self._lengths) :]
        if len(own) < len(self._lengths):
            return False
        if own == self._lengths.tolist():
            start = sum(own)
            fill = None if fed.token_ids is None else np.unique(fed.token_ids[0, start:])
            return not tail or fill is None or len(fill) == 1
        multiple = math.gcd(*own)
        return multiple > 1 and all(0 <= n - length < multiple for n, length in zip(own, self._lengths, strict=True))

    def _continued(self, fed: Fed) -> np.ndarray:
        """Rows [B, S] where a cache holds the tokens before."""
        if len(fed.real) != len(self._lengths):
            raise InputError(
                f"the forward was fed {len(fed.real)} rows, but the trace has {len(self._lengths)} sequences"
            )
        if fed.cached == 0:
            self._done[:] = 0
        position = self._done[:, None] + fed.real.cumsum(1) - 1
        inside = fed.real & (position < self._lengths[:, None])
        self._done += fed.real.sum(1)
        return np.where(inside, self._trace.offsets[:-1, None] + position, -1)

    def _check_token_ids(self, fed: Fed, rows: np.ndarray) -> None:
        assert self._token_ids is not None and fed.token_ids is not None
        expected = np.append(self._token_ids, -1)[rows]
        wrong = np.argwhere((rows >= 0) & (expected != fed.token_ids))
        if len(wrong):
            b, s = wrong[0]
            sequence = int(np.searchsorted(self._trace.offsets, rows[b, s], side="right")) - 1
            position = rows[b, s] - self._trace.offsets[sequence]
            raise InputError(
                f"the forward was fed token {fed.token_ids[b, s]} at [{b}, {s}], but the routing there was recorded "
                f"for token {expected[b, s]} (sequence {sequence}, position {position}); {len(wrong)} tokens differ: "
                "another batch, or one that is shifted"
            )
