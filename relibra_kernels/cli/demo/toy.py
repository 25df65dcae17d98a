"""A small Qwen3-MoE that learns to sort digits: the model and the task of the demo.

A prompt is `BOS digits SEP`, the answer the digits in ascending order and EOS. The reward is the share of the answer
that is right, so it can be verified without a model.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ...integrations.transformers import replace_moe_blocks

BOS, SEP, EOS, VOCABULARY = 10, 11, 12, 16  # tokens 0..9 are the digits
DIGITS = (8, 12, 16, 20)  # prompt lengths
EXPERTS, TOP_K, LAYERS, HIDDEN, INTERMEDIATE = 32, 8, 4, 256, 256
POPULARITY_WEIGHT = 0.3  # of the loss that makes some experts popular, against the loss of the task


def build_model(seed: int) -> nn.Module:
    """Random weights; the experts are taken over by our kernels."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=64,
    )
    model = Qwen3MoeForCausalLM(config)
    replace_moe_blocks(model)
    return model


@contextmanager
def recorded_choices(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the experts of every layer are asked for in the forwards within: int64 [T, K] each, layer by layer."""
    chosen: list[Tensor] = []
    layers = replace_moe_blocks(model)
    hooks = [layer.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1])) for layer in layers]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


def make_prompts(random: np.random.Generator, count: int, digits: int) -> np.ndarray:
    """int64 [count, digits + 2]."""
    prompts = np.empty((count, digits + 2), np.int64)
    prompts[:, 0], prompts[:, -1] = BOS, SEP
    prompts[:, 1:-1] = random.integers(0, 10, (count, digits))
    return prompts


def right_answers(prompts: np.ndarray) -> np.ndarray:
    """int64 [count, digits + 1]: sorted digits and EOS."""
    return np.concatenate([np.sort(prompts[:, 1:-1], 1), np.full((len(prompts), 1), EOS)], 1)


def train_on_task(model: nn.Module, steps: int, seed: int) -> Generator[None, None, float]:
    """Supervised training; yields for every step, and returns the last loss of the task.

    A second loss pulls the routers' mean probabilities towards a popularity that falls from expert to expert, the
    opposite of a balancing loss: without it, so small a model keeps its two ranks within 1.2 of the mean.
    """
    random = np.random.default_rng(seed)
    popularity = torch.softmax(-torch.arange(EXPERTS) / 16.0, 0)
    logits: list[Tensor] = []
    routers = [layer.router.module for layer in replace_moe_blocks(model)]
    hooks = [router.register_forward_hook(lambda _m, _i, out: logits.append(out[0])) for router in routers]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        digits = int(random.choice(DIGITS))
        prompts = make_prompts(random, 16, digits)
        ids = torch.from_numpy(np.concatenate([prompts, right_answers(prompts)], 1))
        logits.clear()
        predicted = model(ids, use_cache=False).logits[:, digits + 1 : -1]
        task = nn.functional.cross_entropy(predicted.flatten(0, 1), ids[:, digits + 2 :].flatten())
        mean_probabilities = torch.stack([layer.softmax(-1).mean(0) for layer in logits])
        skew = -(popularity * mean_probabilities.log()).sum(-1).mean()
        optimizer.zero_grad()
        (task + POPULARITY_WEIGHT * skew).backward()
        optimizer.step()
        yield
    for hook in hooks:
        hook.remove()
    return task.item()
