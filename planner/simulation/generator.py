"""Routing like that of real models, from published statistics: log-normal popularity that drifts between micro-batches.

An expert's popularity is exp(width * z). z is normal, and the sum of a part that is fixed for the batch and a part that
is new in every micro-batch. Two numbers are searched, so that two statistics come out as asked for:

max_mean  sets the width: load of the hottest expert over that of the mean expert, mean over (layer, micro-batch)
change    sets the size of the new part: share of the eight hottest experts that were not among the eight hottest of
          the micro-batch before

No expert gets more than one assignment of a token. Published (see docs/simulator.md): Qwen3-30B-A3B max/mean 7.3 on
DAPO-Math, with a change of 16-20 %; DeepSeek-R1 5.2-8.2 by workload; gpt-oss-20b 1.9-3.8.
"""

import numpy as np

from ..errors import InputError
from ..trace import RoutingTrace

_HALVINGS = 20


def generate_loads(
    layers: int,
    micro_batches: int,
    experts: int,
    top_k: int,
    tokens: int,
    *,
    max_mean: float = 7.3,
    change: float = 0.18,
    seed: int = 0,
) -> np.ndarray:
    """int32 [L, M, E]: loads of micro-batches with `tokens` tokens each, all ranks together.

    max_mean: load of the hottest expert over the mean expert's, mean over (layer, micro-batch)
    change:   share of the eight hottest experts that is new in each micro-batch
    """
    share = _shares(layers, micro_batches, experts, top_k, max_mean, change, seed)
    return np.random.default_rng([seed, 1]).binomial(tokens, share).astype(np.int32)


def generate_trace(
    layers: int,
    sequences: int,
    experts: int,
    top_k: int,
    length: int,
    *,
    max_mean: float = 7.3,
    seed: int = 0,
) -> RoutingTrace:
    """A trace of sequences of `length` tokens, of which the last is not recorded, as engines leave it.

    Experts are drawn by popularity (Gumbel top-k), which drifts from one sequence to the next. max_mean: as for
    `generate_loads`, with sequences for micro-batches.
    """
    share = _shares(layers, sequences, experts, top_k, max_mean, 0.18, seed)
    rng = np.random.default_rng([seed, 1])
    ids = np.empty((sequences, length, layers, top_k), np.int8 if experts <= 128 else np.int16)
    for sequence in range(sequences):
        odds = np.log(np.maximum(share[:, sequence], 1e-12))
        score = odds + rng.gumbel(size=(length, layers, experts))
        ids[sequence] = np.argpartition(-score, top_k - 1, axis=2)[..., :top_k]
    ids[:, -1] = -1
    offsets = np.arange(sequences + 1, dtype=np.int64) * length
    return RoutingTrace(ids.reshape(-1, layers, top_k), offsets, experts, tuple(range(layers)))


def hottest_change(loads_LME: np.ndarray) -> float:
    """The share of the eight hottest experts that were not among the eight of the micro-batch before."""
    top = np.argsort(-loads_LME, axis=2, kind="stable")[..., :8]
    kept = (top[:, 1:, :, None] == top[:, :-1, None, :]).any(3)
    return float(1 - kept.mean()) if kept.size else 0.0


def _shares(
    layers: int, micro_batches: int, experts: int, top_k: int, max_mean: float, change: float, seed: int
) -> np.ndarray:
    """float64 [L, M, E]: the part of all tokens that choose each expert; sums to top_k."""
    if not 1 <= max_mean < experts / top_k:
        raise InputError(
            f"max_mean is {max_mean}, but must be 1 to {experts / top_k}, where an expert gets every token"
        )
    rng = np.random.default_rng([seed, 0])
    fixed, drift = rng.normal(size=(layers, 1, experts)), rng.normal(size=(layers, micro_batches, experts))
    low, high = 0.0, 1.0
    for _ in range(8):
        mixed = np.sqrt(1 - (low + high) ** 2 / 4) * fixed + (low + high) / 2 * drift
        low, high = ((low + high) / 2, high) if hottest_change(mixed) < change else (low, (low + high) / 2)
    mixed = np.sqrt(1 - low**2) * fixed + low * drift
    low, high = 0.0, 8.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        share = _cap(np.exp(middle * mixed), top_k)
        if (share.max(2) * experts / top_k).mean() < max_mean:
            low = middle
        else:
            high = middle
    return _cap(np.exp(low * mixed), top_k)


def _cap(weight_LME: np.ndarray, top_k: int) -> np.ndarray:
    """Scaled to sum to top_k with no expert above 1."""
    share = weight_LME / weight_LME.sum(2, keepdims=True) * top_k
    for _ in range(6):
        full = share >= 1
        free = np.where(full, 0, share)
        left = top_k - full.sum(2, keepdims=True)
        share = np.where(full, 1, free * left / np.maximum(free.sum(2, keepdims=True), 1e-300))
    return np.minimum(share, 1)
