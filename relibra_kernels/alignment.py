"""Whether recorded routing belongs to these tokens: a record that is shifted by a token or layer shows in no other way.

In the first MoE layers a model's own choice agrees with its record on 98 to 100 % of the top-k sets, also where the
engine computed in bf16; shifted by one token it agrees on 1 % in the first layer. (Measured on gpt-oss-20b.)
"""

import logging
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
LEAST, USUAL = 0.5, 0.9  # shares of equal top-k sets: below the first something is wrong, below the second perhaps
FEWEST = 16  # token-layers that say anything
ENOUGH = 1000  # token-layers from which on a record is refused where nobody asked for it: fewer are a trial's


def check_on_shift(on_shift: Shift | None) -> None:
    """Raises: InputError where it is none of SHIFTS, nor None."""
    if on_shift is not None and on_shift not in SHIFTS:
        raise InputError(f"on_shift is {on_shift!r}; it must be one of {SHIFTS}")


class Alignment:
    """Compares live choices with recorded ones in the first layers of one forward.

    share: of (token, layer) whose top-k sets are equal; None before `judge`
    same, known: how many (token, layer) that is, and of how many; 0 before `judge`
    judged_later: whether whoever made this judges; else the last layer that is compared does

    Args:
        on_shift: None is "refuse" from ENOUGH token-layers on, and "warn" below.
        download: begins to bring a tensor to the host, and returns what gives it. None: `judge` waits for the device.
    """

    def __init__(
        self, on_shift: Shift | None = "refuse", download: Callable[[Tensor], Callable[[], np.ndarray]] | None = None
    ):
        check_on_shift(on_shift)
        self.on_shift, self.judged_later = on_shift, download is not None
        self.share: float | None = None
        self.same = self.known = 0
        self._download = download or (lambda tensor: lambda: tensor.numpy(force=True))
        self._counts: dict[int, Callable[[], np.ndarray]] = {}

    @property
    def wanted(self) -> bool:
        """Whether another layer is to be compared."""
        return self.on_shift != "ignore" and self.share is None and len(self._counts) < LAYERS

    def compare(self, layer: int, live_TK: Tensor, recorded_TK: Tensor) -> None:
        """One layer. Tokens with a recorded id of -1 do not count. Does not wait for the device."""
        known_T = (recorded_TK >= 0).all(1)
        same_T = (live_TK.sort(1).values == recorded_TK.sort(1).values).all(1) & known_T
        self._counts[layer] = self._download(torch.stack([same_T.sum(), known_T.sum()]))

    def judge(self, what: str = "the record") -> None:
        """Wait for the comparison, once. Raises: InputError below LEAST; logs a warning below USUAL."""
        if not self._counts or self.share is not None:
            return
        counts = {layer: get().tolist() for layer, get in self._counts.items()}
        same, known = (sum(column) for column in zip(*counts.values(), strict=True))
        if known < FEWEST:
            self._counts.clear()
            return
        self.same, self.known, self.share = same, known, same / known
        by_layer = ", ".join(f"layer {layer}: {s / max(k, 1):.0%}" for layer, (s, k) in sorted(counts.items()))
        said = (
            f"{what} agrees with the model's own choice on {self.share:.0%} of the top-k sets in the first MoE layers "
            f"({by_layer}; 98 to 100 % is usual): it is shifted by a token or a layer, of another model, or "
            "of an older policy"
        )
        refuses = self.on_shift == "refuse" or (self.on_shift is None and known >= ENOUGH)
        if self.share < LEAST and refuses:
            raise InputError(f"{said}; where it is stale on purpose, on_shift='ignore' replays it all the same")
        if self.share < USUAL:
            _LOG.warning("%s", said)
