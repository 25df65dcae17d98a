"""Rollouts with group rewards, and the routing that was recorded while generating."""

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...planner import RoutingTrace, from_vllm
from .toy import DIGITS, EOS, EXPERTS, make_prompts, recorded_choices, right_answers

GROUP = 8  # samples of one prompt, compared with each other


@dataclass(frozen=True)
class Rollouts:
    """One batch of sampled sequences.

    tokens:          int64 [n] for each sequence, prompt and answer
    prompt_lengths:  int64 [sequences]
    log_probs:       fp32 [n - prompt length] for each sequence, of the answer's tokens when they were sampled
    advantages:      fp32 [sequences], reward minus the group's mean, over its deviation
    reward:          mean reward
    trace:           the recorded routing; each sequence's last token is unknown, since it was never fed back
    """

    tokens: list[np.ndarray]
    prompt_lengths: np.ndarray
    log_probs: list[np.ndarray]
    advantages: np.ndarray
    reward: float
    trace: RoutingTrace


def sample_rollouts(model: nn.Module, seed: int, prompts_of_a_length: int) -> Generator[None, None, Rollouts]:
    """The rollouts; yields for every prompt length that is done."""
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens, log_probs, routed, prompt_lengths, rewards = [], [], [], [], []
    for digits in DIGITS:
        prompts = make_prompts(random, prompts_of_a_length, digits).repeat(GROUP, 0)
        answers, answer_log_probs, routing = _generate(model, torch.from_numpy(prompts), digits + 4, generator)
        right = right_answers(prompts)
        for i, prompt in enumerate(prompts):
            length = int(np.argmax(np.append(answers[i] == EOS, True))) + 1  # EOS included, or all that was generated
            answer = answers[i, :length]
            tokens.append(np.concatenate([prompt, answer]))
            log_probs.append(answer_log_probs[i, : len(answer)])
            routed.append(routing[i, : len(prompt) + len(answer) - 1])
            prompt_lengths.append(len(prompt))
            shared = min(len(answer), right.shape[1])
            rewards.append((answer[:shared] == right[i, :shared]).sum() / max(len(answer), right.shape[1]))
        yield
    by_group = np.array(rewards).reshape(-1, GROUP)
    advantages = (by_group - by_group.mean(1, keepdims=True)) / (by_group.std(1, keepdims=True) + 1e-4)
    return Rollouts(
        tokens=tokens,
        prompt_lengths=np.array(prompt_lengths),
        log_probs=log_probs,
        advantages=advantages.reshape(-1).astype(np.float32),
        reward=float(by_group.mean()),
        trace=from_vllm(routed, EXPERTS, num_tokens=[len(sequence) for sequence in tokens]),
    )


@torch.no_grad()
def _generate(
    model: nn.Module, prompts: Tensor, most: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sample `most` tokens: (answers [B, most], their log-probabilities, routing uint8 [B, P + most - 1, L, K])."""
    batch = len(prompts)
    answers, log_probs, routing = [], [], []
    cache, fed = None, prompts
    for _ in range(most):
        with recorded_choices(model) as recorded:
            out = model(fed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chosen = torch.stack(recorded, 1)  # [B * tokens, L, K]
        routing.append(chosen.view(batch, fed.shape[1], *chosen.shape[1:]))
        distribution = out.logits[:, -1].log_softmax(-1)
        fed = torch.multinomial(distribution.exp(), 1, generator=generator)
        answers.append(fed)
        log_probs.append(distribution.gather(1, fed))
    return (
        torch.cat(answers, 1).numpy(),
        torch.cat(log_probs, 1).numpy(),
        torch.cat(routing, 1).to(torch.uint8).numpy(),
    )
