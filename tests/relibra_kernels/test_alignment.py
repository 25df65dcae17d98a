"""Whether recorded routing belongs to these tokens, told by a few of them."""

import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from relibra_kernels.alignment import SHIFTED, Alignment


def skewed(num_tokens: int, num_experts: int, top_k: int, seed: int) -> Tensor:
    """int64 [T, 2, K]: low experts more often than high ones."""
    scores = np.random.default_rng(seed).random((num_tokens, 2, num_experts)) * np.arange(num_experts, 0, -1)
    return torch.from_numpy(scores.argsort(-1)[..., ::-1][..., :top_k].copy())


def shift_of(live: Tensor, recorded: Tensor) -> str | None:
    alignment = Alignment("warn")
    for layer in range(2):
        alignment.compare(layer, live[:, layer], recorded[:, layer])
    alignment.judge()
    return alignment.shift


@pytest.mark.parametrize(("num_experts", "top_k"), [(6, 5), (4, 2), (4, 3), (3, 1), (8, 7), (7, 3), (8, 2)])
def test_what_agrees_by_chance_is_no_shift(num_experts, top_k, caplog):
    """Few experts, or most of them chosen, make few sets, of which some are frequent."""
    caplog.set_level(logging.CRITICAL)
    for seed in range(60):
        live, recorded = (skewed(24, num_experts, top_k, 2 * seed + i) for i in range(2))
        assert shift_of(live, recorded) is None, seed


@pytest.mark.parametrize("shift", SHIFTED)
def test_a_shift_is_told_from_chance(shift, caplog):
    caplog.set_level(logging.CRITICAL)
    live = skewed(100, 8, 2, 0)
    others = skewed(100, 8, 2, 1)
    recorded = {
        "late": live.roll(1, 0),
        "early": live.roll(-1, 0),
        "layer late": torch.stack([others[:, 0], live[:, 0]], 1),
        "layer early": torch.stack([live[:, 1], others[:, 1]], 1),
    }[shift]
    assert shift_of(live, recorded) == shift
