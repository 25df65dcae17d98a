"""The one way to compare numbers in tests."""

import os

import torch

# Norm-wise relative error against float64 of the layer's chain of products, by the dtype of its tensors. Triton's
# interpreter truncates where it stores bf16, which doubles the rounding error and makes it one-sided.
BFLOAT16 = 4e-2 if os.environ.get("TRITON_INTERPRET") == "1" else 1.5e-2
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: BFLOAT16}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`|actual - expected| / |expected|` in the Frobenius norm; NaN counts as infinite."""
    difference = (actual.detach().double() - expected.detach().double()).norm()
    scale = expected.detach().double().norm()
    if not torch.isfinite(difference):
        return float("inf")
    return float(difference / scale) if scale > 0 else float(difference)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
    """Equal shapes, and a relative error of at most `tolerance`."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"
