"""The fast sigmoid's error over all gates of 2-byte types, from the stated errors of its two instructions.

PTX ISA: ex2.approx.ftz.f32 has a relative error of 2^-22 at most, rcp.approx.ftz.f32 one unit in the last place. No GPU
is needed: both errors are put to their worst in both directions.
"""

import numpy as np
import pytest
import torch

SCALES = (1.0, 1.702)  # silu, gpt-oss


def worst_error(x, scale):
    """(largest relative error, where) of 1 / (1 + 2^(x * -scale * log2(e))) against float64; x in float32."""
    exact = 1 / (1 + np.exp(-scale * x.astype(np.float64)))  # x is not below the range of exp
    with np.errstate(over="ignore"):  # to -inf, as in the kernel
        power = (x * np.float32(scale * -1.4426950408889634)).astype(np.float64)  # rounded once, as the kernel does
    error = np.zeros(len(x))
    for first in (1 - 2.0**-22, 1 + 2.0**-22):
        total = (1 + np.exp2(power) * first).astype(np.float32).astype(np.float64)
        for second in (1 - 2.0**-23, 1 + 2.0**-23):
            error = np.maximum(error, np.abs(second / total / exact - 1))
    return error


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_error_over_the_whole_range(dtype, scale):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    x = every[every.isfinite()].numpy()
    scaled = scale * x.astype(np.float64)
    usual = np.abs(scaled) <= 8
    assert worst_error(x[usual], scale).max() < 2.0**-20
    above = scaled >= -87
    assert worst_error(x[above], scale).max() < 2.0**-17
    # below, the sigmoid is less than 2^-125 and may be 0: what it multiplies is below the smallest of either type
    with np.errstate(over="ignore"):
        lost = np.abs(x[~above] / (1 + np.exp(-scaled[~above])))
    assert lost.max(initial=0) < 2.0**-117
