"""`relibra doctor --model FOLDER`: what works for a model of transformers, and what a copy of an expert takes."""

from collections.abc import Iterator
from typing import Any, Literal

from ..planner.errors import ReLibraError

MIB = 1 << 20


def examine(folder: str) -> Iterator[tuple[Literal["ok", "note", "problem"], str, str]]:
    """(level, what was found, what to do about it) for the model of a config.json, which is made without memory."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        yield "problem", f"{error.name} is not installed", "pip install 'relibra-kernels[transformers]'"
        return
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        yield "problem", f"{folder} gives no causal language model: {str(error).splitlines()[0]}", ""
        return
    yield from _of(model)


def _of(model: Any) -> Iterator[tuple[Literal["ok", "note", "problem"], str, str]]:
    from ..integrations.transformers import expert_form
    from ..integrations.transformers.experts import expert_weights
    from ..integrations.transformers.moe_layers import moe_layers

    name = type(model).__name__
    try:
        layers = moe_layers(model)
    except ReLibraError as error:
        yield (
            "problem",
            f"{name}: {error}",
            "Llama4, JetMoE and LongCat-Flash do not use transformers' experts interface: they cannot be taken over",
        )
        return
    first = layers[0]
    ids = f"{layers[0].layer_id}..{layers[-1].layer_id}"
    yield "ok", f"{name}: {len(layers)} MoE layers ({ids}), top {first.top_k} of {first.num_experts} experts", ""
    try:
        form = expert_form(first.experts)
    except ReLibraError as error:
        yield "problem", f"kernels: {error}", "record and replay work all the same"
        return
    yield "ok", f"kernels: {form}", ""
    weights = expert_weights(first.experts).tensors()
    elements = sum(weight[0].numel() for weight in weights)
    size, gradient = elements * weights[0].element_size(), elements * 4
    yield (
        "ok",
        f"a copy of an expert takes {size / MIB:.1f} MiB ({weights[0].dtype}), and its fp32 gradient "
        f"{gradient / MIB:.1f} MiB where it is kept or trained",
        "",
    )
    yield "ok", "record, replay and ExpertParallel: the model is taken over where it is", ""
