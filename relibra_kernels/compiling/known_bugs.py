"""Programs that Triton is known to compile wrongly, found in its IR: what is found here must not be launched.

Both bugs are of Blackwell's tensor cores, and give wrong numbers without an error.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..configs.limits import Device

_DOT = re.compile(r"^\s*(%[\w#]+) = tt\.dot %[\w#]+, %[\w#]+, (%[\w#]+)", re.MULTILINE)


def known_bug(ttir: str, constants: Mapping[str, Any], device: Device) -> str:
    """Which bug of Triton `ttir` meets on `device`; empty where none is known.

    Args:
        ttir: Triton's IR before it is lowered for a target.
        constants: the kernel's; those of the GEMM kernels name the contraction's length D and its BLOCK_K.
    """
    if device.family != "blackwell":
        return ""
    if "tt.descriptor_gather" in ttir and constants["D"] % constants["BLOCK_K"]:
        return f"Triton issue 10927: a descriptor gather with K {constants['D']}, no multiple of {constants['BLOCK_K']}"
    sums: set[str] = set()
    for result, accumulator in _DOT.findall(ttir):
        if accumulator in sums:
            return f"Triton issue 10821: {result} adds to the accumulator of the product before it, {accumulator}"
        sums.add(result)
    return ""
