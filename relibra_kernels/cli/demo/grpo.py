"""The GRPO training step over one micro-batch: padded input, recorded rows, clipped policy loss."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .rollout import Rollouts

CLIP = 0.2


@dataclass(frozen=True)
class Inputs:
    """Some sequences, padded at the end to one length.

    ids:        int64 [B, N]
    rows:       int64 [B * N], row of the sequences' trace, -1 for padding
    answer:     bool [B, N - 1], whether the next token is part of the answer
    log_probs:  fp32 [B, N - 1], of the next token when it was sampled
    advantages: fp32 [B]
    """

    ids: Tensor
    rows: np.ndarray
    answer: Tensor
    log_probs: Tensor
    advantages: Tensor


def make_inputs(rollouts: Rollouts, sequences: np.ndarray) -> Inputs:
    """The inputs of these sequences, whose trace rows follow each other in the same order."""
    lengths = [len(rollouts.tokens[i]) for i in sequences]
    shape = (len(sequences), max(lengths, default=1))
    ids, rows = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    answer, log_probs = np.zeros((shape[0], shape[1] - 1), bool), np.zeros((shape[0], shape[1] - 1), np.float32)
    first_row = 0
    for i, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        ids[i, :length] = rollouts.tokens[sequence]
        rows[i, :length] = first_row + np.arange(length)
        first_row += length
        span = slice(rollouts.prompt_lengths[sequence] - 1, length - 1)
        answer[i, span] = True
        log_probs[i, span] = rollouts.log_probs[sequence]
    return Inputs(
        ids=torch.from_numpy(ids),
        rows=rows.reshape(-1),
        answer=torch.from_numpy(answer),
        log_probs=torch.from_numpy(log_probs),
        advantages=torch.from_numpy(rollouts.advantages[sequences]),
    )


def sequence_losses(model: nn.Module, inputs: Inputs) -> Tensor:
    """fp32 [B]: the clipped policy-gradient loss of each sequence, summed over its answer."""
    logits = model(inputs.ids, use_cache=False).logits[:, :-1]
    log_probs = logits.log_softmax(-1).gather(-1, inputs.ids[:, 1:, None]).squeeze(-1)
    ratio = (log_probs - inputs.log_probs).exp()
    gain = torch.minimum(
        ratio * inputs.advantages[:, None], ratio.clamp(1 - CLIP, 1 + CLIP) * inputs.advantages[:, None]
    )
    return -(gain * inputs.answer).sum(1)


def answer_tokens(rollouts: Rollouts) -> int:
    """Tokens that the loss of the whole batch is divided by."""
    return sum(map(len, rollouts.log_probs))
