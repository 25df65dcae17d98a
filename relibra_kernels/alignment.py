"""Whether recorded routing is of these tokens: a record that is shifted by one token or layer has no other sign.

In the first MoE layers a model's own choice agrees with its record on 98 to 100 % of the top-k sets, also where the
engine computed in bf16; shifted by one token it agrees on 1 % in the first layer. (Measured on gpt-oss-20b.)
"""

import logging
from typing import Literal

import torch
from torch import Tensor

from .planner.errors import InputError

_LOG = logging.getLogger(__name__)

Shift = Literal["refuse", "warn", "ignore"]
SHIFTS: tuple[Shift, ...] = ("refuse", "warn", "ignore")
LAYERS = 2  # the first MoE layers, which are compared
LEAST, USUAL = 0.5, 0.9  # shares of equal top-k sets: below the first something is wrong, below the second perhaps
FEWEST = 16  # token-layers that say anything


class Alignment:
    """Compares live choices with recorded ones in the first layers of one forward.

    share: of (token, layer) whose top-k sets are equal; None before `judge`
    """

    def __init__(self, on_shift: Shift = "refuse"):
        if on_shift not in SHIFTS:
            raise InputError(f"on_shift is {on_shift!r}; it must be one of {SHIFTS}")
        self.on_shift = on_shift
        self.share: float | None = None
        self._counts: list[Tensor] = []

    @property
    def wanted(self) -> bool:
        """Whether another layer is to be compared."""
        return self.on_shift != "ignore" and self.share is None and len(self._counts) < LAYERS

    def compare(self, live_TK: Tensor, recorded_TK: Tensor) -> None:
        """One layer. Tokens with a recorded id of -1 do not count. Does not wait for the device."""
        known_T = (recorded_TK >= 0).all(1)
        same_T = (live_TK.sort(1).values == recorded_TK.sort(1).values).all(1) & known_T
        self._counts.append(torch.stack([same_T.sum(), known_T.sum()]))

    def judge(self, what: str = "the record") -> None:
        """Wait for the comparison, once. Raises: InputError below LEAST; logs a warning below USUAL."""
        if not self._counts or self.share is not None:
            return
        same, known = torch.stack([counts.cpu() for counts in self._counts]).sum(0).tolist()
        if known < FEWEST:
            self._counts.clear()
            return
        self.share = same / known
        said = (
            f"{what} agrees with the model's own choice on {self.share:.0%} of the top-k sets in the first MoE layers "
            "(98 to 100 % is usual): it is shifted by a token or a layer, of another model, or of an older policy"
        )
        if self.share < LEAST and self.on_shift == "refuse":
            raise InputError(f"{said}; where it is stale on purpose, on_shift='ignore' replays it all the same")
        if self.share < USUAL:
            _LOG.warning("%s", said)
