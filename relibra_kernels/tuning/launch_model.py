"""What is modelled: one launch with its group sizes, what a compiled config needs, and how long it would take."""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from ..compiling.machine_code import MachineCode
from ..configs.products import Product

LAUNCH_US = 3.0  # a launch that does nothing
_NOT_HIDDEN = 0.1  # part of the shorter of computing and of DRAM that the other does not hide
ITEM = 2  # bytes of an operand
_SIGMA = 0.9  # of log-normal group sizes


@dataclass(frozen=True)
class Resources:
    """What a compiled config needs, and the figures of its machine code; see `compile_only.Report`."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    warps_per_sm: int
    code: MachineCode | None = None

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Resources":
        """From what `dataclasses.asdict` gave, after a way through JSON."""
        code = fields.get("code")
        if code is not None:
            code = MachineCode(**{**code, "buffers": tuple(code["buffers"])})
        return Resources(**{**fields, "code": code})


@dataclass(frozen=True)
class Work:
    """One launch: the kernel's N and D as in `configs.files.Entry.sizes`, and the rows of every slot.

    Attributes:
        gathers: rows are picked by index, without a descriptor.
        part: of the layer; top_k: rows that a token has.
    """

    kernel: str
    n: int
    d: int
    gathers: bool
    rows: np.ndarray  # int [slots]
    part: str = ""
    top_k: int = 1


class LaunchEstimate(NamedTuple):
    """Waves of tiles, rows that are computed for nothing, bytes from DRAM, and what bounds the time."""

    us: float
    waves: int
    padded_rows: int
    dram_bytes: int
    bound: str


def bounded(clocks: float, dram_bytes: int, waves: int, padded: int, product: Product) -> LaunchEstimate:
    """The time of a launch that computes and moves bytes at the same time."""
    on_chip, off_chip = clocks / product.hertz * 1e6, dram_bytes / product.dram * 1e6
    bound = "tiles" if on_chip >= off_chip else "DRAM"
    us = LAUNCH_US + max(on_chip, off_chip) + _NOT_HIDDEN * min(on_chip, off_chip)
    return LaunchEstimate(us, waves, padded, int(dram_bytes), bound)


def balanced(slots: int, rows_per_slot: int) -> np.ndarray:
    """Equal group sizes, int64 [slots]."""
    return np.full(slots, rows_per_slot, np.int64)


def skewed(slots: int, rows_per_slot: int) -> np.ndarray:
    """Log-normal group sizes with that mean: its quantiles, largest first, so nothing is random.

    Of 128 experts the max/mean is 7.3, as recorded for Qwen3-30B-A3B (DAPO-Math).
    """
    quantiles = [NormalDist().inv_cdf((2 * slot + 1) / (2 * slots)) for slot in reversed(range(slots))]
    shares = np.exp(_SIGMA * np.array(quantiles))
    total = slots * rows_per_slot
    ends = np.floor(np.cumsum(shares) / shares.sum() * total + 0.5).astype(np.int64)
    ends[-1] = total
    return np.diff(ends, prepend=0)
