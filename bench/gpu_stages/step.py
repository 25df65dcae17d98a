"""Whole training steps on one GPU: a Hugging Face model, the expert-parallel runtime alone, and their timelines."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from .case import Case, Wrong
from .smoke import COMPILED

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from .setting import Setting

EXPERTS = ("relibra", "grouped_mm", "eager")


def cases(rehearse: bool) -> list[Case]:
    # a rehearsal computes whole models with the torch reference
    return [
        Case("transformers", "hugging_face", seconds=60, env=COMPILED, may_miss=True),
        Case("expert parallel, one rank", "expert_parallel", seconds=60, env=COMPILED, may_miss=True),
    ]


def make_model(setting: Setting) -> Any:
    """A Qwen3-MoE of four layers with the sizes of Qwen3-30B-A3B and a quarter of its experts."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = setting.size(
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 32, "num_experts_per_tok": 8,
         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32768,
         "num_hidden_layers": 4},
        {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "num_hidden_layers": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    with setting.device:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    return model.to(setting.size(torch.bfloat16, torch.float32))


def hugging_face(setting: Setting) -> None:
    """Forward and backward of the model with each implementation of its experts, in turns, and the profile of ours."""
    import torch

    import relibra_kernels.integrations.transformers  # noqa: F401 (registers)

    from .profile import profiled

    model = make_model(setting)
    batch, length = setting.size((8, 1024), (1, 12))
    ids = torch.randint(3, model.config.vocab_size, (batch, length), device=setting.device)
    losses: dict[str, float] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name in EXPERTS:
        steps[name] = lambda name=name: _train(model, ids, name)  # type: ignore[misc]
        losses[name] = float(steps[name]())  # type: ignore[arg-type]
        steps[name]()
    setting.report.figures(losses=losses, tokens=batch * length)
    if max(losses.values()) - min(losses.values()) > 0.05:
        raise Wrong(f"losses differ by the implementation of experts: {losses}")
    turns = setting.clock.in_turns({**steps, "relibra again": steps["relibra"]}, setting.size(7, 1))
    middle = {name: median(seconds) for name, seconds in turns.items()}
    setting.report.figures(
        step_ms={name: 1e3 * seconds for name, seconds in middle.items()},
        tokens_per_second=batch * length / middle["relibra"],
        ratio_to_grouped_mm=middle["grouped_mm"] / middle["relibra"],
        noise=middle["relibra again"] / middle["relibra"],
    )
    trace = setting.work / "trace-transformers.json"
    setting.report.figures(profile=profiled(steps["relibra"], trace, on_gpu=not setting.rehearse))


def _train(model: Any, ids: torch.Tensor, experts: str) -> torch.Tensor:
    model.set_experts_implementation(experts)
    model.zero_grad(set_to_none=True)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


def expert_parallel(setting: Setting) -> None:
    """`ExpertParallel` at world size 1 under a plan: steps a second, what waits for the device, launches and gaps."""
    from .parallel_step import ParallelStep
    from .profile import profiled

    with ParallelStep.opened(setting) as step:
        step.run()
        step.run()
        seconds = setting.clock.on_the_host(step.run, setting.size(5, 1))
        setting.report.figures(
            step_ms=1e3 * seconds, tokens=step.tokens, tokens_per_second=step.tokens / seconds, loss=step.loss
        )
        waits = step.waits()
        setting.report.figures(waits=waits, profile=profiled(
            step.run, setting.work / "trace-expert-parallel.json", on_gpu=not setting.rehearse
        ))  # fmt: skip
    if waits:
        raise Wrong(f"a step waits for the device: {waits}")
