"""Whether recorded routing belongs to these tokens: a record that is shifted by a token or layer shows in no other way.

In the first MoE layers a model's own choice agrees with its record on 98 to 100 % of the top-k sets, also where the
engine computed in bf16; shifted by one token it agrees on 1 % in the first layer. (Measured on gpt-oss-20b.)
"""

import logging
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .planner.errors import InputError

_LOG = logging.getLogger(__name__)

Shift = Literal["refuse", "warn", "ignore"]
SHIFTS: tuple[Shift, ...] = ("refuse", "warn", "ignore")
LAYERS = 2  # the first MoE layers, which are compared
SHIFTED = {  # which comparison a record agrees in that is shifted, and what it then is
    "late": "one token late: rows hold what belongs to the token before",
    "early": "one token early: rows hold what belongs to the token after",
    "layer late": "one layer late: it holds for a layer what belongs to the one before",
    "layer early": "one layer early: it holds for a layer what belongs to the one after",
}
LEAST, USUAL = 0.5, 0.9  # shares of equal top-k sets: below the first something is wrong, below the second perhaps
FEWEST = 16  # token-layers that say anything
SAMPLE, DEVIATIONS = 64, 5.0  # tokens that tell how often sets are equal by chance; how far above that a shift is
ENOUGH = 1000  # token-layers from which on any record is refused where nobody asked for it: fewer are a trial's


def check_on_shift(on_shift: Shift | None) -> None:
    """Raises: InputError where it is none of SHIFTS, nor None."""
    if on_shift is not None and on_shift not in SHIFTS:
        raise InputError(f"on_shift is {on_shift!r}; it must be one of {SHIFTS}")


class Alignment:
    """Compares live choices with recorded ones in the first layers of one forward.

    share: the part of all compared (token, layer) pairs whose top-k sets are equal; None before `judge`
    shift: which of SHIFTED the record is, if so shifted it agrees on more than twice as many pairs; else None
    same, known: how many pairs are equal, and how many were compared; 0 before `judge`
    judged_later: True: its owner calls `judge`; False: the router of the last layer that is compared does

    Args:
        on_shift: None: "refuse" where the record is shifted or at least ENOUGH pairs were compared, else "warn".
        download: begins to bring a tensor to the host, and returns what gives it. None: `judge` waits for the device.
    """

    def __init__(self, on_shift: Shift | None, download: Callable[[Tensor], Callable[[], np.ndarray]] | None = None):
        check_on_shift(on_shift)
        self.on_shift, self.judged_later = on_shift, download is not None
        self.share: float | None = None
        self.shift: str | None = None
        self.same = self.known = 0
        self._download = download or (lambda tensor: lambda: tensor.numpy(force=True))
        self._counts: dict[int, Callable[[], np.ndarray]] = {}
        self._before: tuple[Tensor, Tensor] | None = None  # live and recorded choices of the layer before

    @property
    def wanted(self) -> bool:
        """Whether another layer is to be compared."""
        return self.on_shift != "ignore" and self.share is None and len(self._counts) < LAYERS

    def compare(self, layer: int, live_TK: Tensor, recorded_TK: Tensor) -> None:
        """One layer. Tokens with a recorded id of -1 do not count. Does not wait for the device."""
        live, recorded = live_TK.sort(1).values, recorded_TK.sort(1).values
        pairs = [(live, recorded), (live[:-1], recorded[1:]), (live[1:], recorded[:-1])]
        if self._before is not None and self._before[0].shape == live.shape:
            pairs += [(self._before[0], recorded), (live, self._before[1])]
        self._before = None if self._counts else (live, recorded)
        self._counts[layer] = self._download(torch.stack([count for pair in pairs for count in _agreeing(*pair)]))

    def judge(self) -> None:
        """Wait for the comparison, once. Raises: InputError below LEAST; logs a warning below USUAL."""
        if not self._counts or self.share is not None:
            return
        counts = {layer: get().reshape(-1, 4).tolist() for layer, get in self._counts.items()}
        same, known = (sum(column) for column in zip(*(found[0][:2] for found in counts.values()), strict=True))
        if known < FEWEST:
            self._counts.clear()
            return
        self.same, self.known, self.share = same, known, same / known
        self.shift = _shift(list(counts.values()))
        by_layer = ", ".join(
            f"layer {layer}: {s / max(k, 1):.0%}" for layer, ((s, k, *_), *_) in sorted(counts.items())
        )
        cause = "it is shifted by a token or a layer, of another model, or of an older policy"
        said = (
            f"the trace agrees with the model's own choice on {self.share:.0%} of the top-k sets in the first MoE "
            f"layers ({by_layer}; 98 to 100 % is usual): {f'it is {SHIFTED[self.shift]}' if self.shift else cause}"
        )
        unasked = self.on_shift is None and (known >= ENOUGH or self.shift is not None)
        if self.share < LEAST and (self.on_shift == "refuse" or unasked):
            raise InputError(f"{said}; where it is stale on purpose, on_shift='ignore' replays it all the same")
        if self.share < USUAL:
            _LOG.warning("%s", said)


def _agreeing(live_TK: Tensor, recorded_TK: Tensor) -> tuple[Tensor, ...]:
    """How many sorted top-k sets are equal, of how many that are recorded; and among all pairs of SAMPLE tokens."""
    known_T = (recorded_TK >= 0).all(1)
    some_SK, known_S = live_TK[:SAMPLE], known_T[:SAMPLE]
    alike_SS = (some_SK[:, None] == recorded_TK[None, :SAMPLE]).all(2) & known_S
    return (
        ((live_TK == recorded_TK).all(1) & known_T).sum(),
        known_T.sum(),
        alike_SS.sum(),
        known_S.sum() * len(some_SK),
    )


def _shift(counts: list[list[list[int]]]) -> str | None:
    """Which of SHIFTED it is, by what `_agreeing` gives for each comparison of each layer.

    The first layer's input is the model's, so that it tells of tokens. The second's has gone through the wrong experts:
    half as much agreement tells there, of four times as many tokens. What is as frequent between any two tokens tells
    nothing: few experts, or most of them chosen, make few sets.
    """
    (here, *by_token), by_layer = counts[0], [pair for found in counts[1:] for pair in found[3:]]
    unshifted, shares = here[0] / max(here[1], 1), {}
    for name, (same, known, alike, pairs) in zip(SHIFTED, [*by_token, *by_layer], strict=False):
        least, fewest = (LEAST / 2, 2 * FEWEST) if name == "layer early" else (LEAST, FEWEST // 2)
        chance = alike / max(pairs, 1)
        by_chance = known * chance + DEVIATIONS * math.sqrt(known * chance * (1 - chance))
        if known >= fewest and same >= by_chance and same / known >= max(least, 2 * unshifted):
            shares[name] = same / known
    return max(shares, key=lambda name: shares[name], default=None)
