"""What parity tests of training check."""

import numpy as np
import torch
from tolerance import relative_error


def worst_error(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Largest norm-wise relative error over named arrays; NaN counts as infinite."""
    assert got.keys() == expected.keys()
    return max(relative_error(torch.from_numpy(got[name]), torch.from_numpy(expected[name])) for name in expected)


def assert_same_bits(first: list[dict], second: list[dict]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one["losses"] == other["losses"]
        for step, gradients in enumerate(one["gradients"]):
            for name, value in gradients.items():
                np.testing.assert_array_equal(value, other["gradients"][step][name])
        for name, value in one["parameters"].items():
            np.testing.assert_array_equal(value, other["parameters"][name])
