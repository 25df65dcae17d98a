"""`relibra doctor --model FOLDER`: what works for a model of transformers, its configs, and what a plan takes."""

import importlib.util
from collections.abc import Iterator
from typing import Any, Literal

from ..configs.config import GEMM_KERNELS
from ..configs.files import SHIPPED
from ..planner import ClusterSpec, PlanOptions, estimate_plan, generate_loads, plan_batch
from ..planner.errors import InputError, ReLibraError
from ..planner.pricing.models import shape_of_sizes

MIB = 1 << 20
RANKS, SLOTS, MICRO_BATCHES, TOKENS = 8, 2, 8, 4096  # of the plan that is estimated; tokens a rank and micro-batch

# Families with experts of their own kind; docs/huggingface.md lists them.
NO_INTERFACE = ("dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers")
_AUTO = ("AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModel")

Found = tuple[Literal["ok", "note", "problem"], str, str]


def examine(folder: str) -> Iterator[Found]:
    """(level, what was found, what to do about it) for the model of a config.json, which is made without memory.

    Args:
        folder: with the config.json, or that file.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        yield "problem", f"{error.name} is not installed", "pip install 'relibra-kernels[transformers]'"
        return
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        yield "problem", f"{folder} has no config of transformers: {str(error).splitlines()[0]}", ""
        return
    yield from examine_config(config)


def examine_config(config: Any) -> Iterator[Found]:
    """The same for a config of transformers."""
    family = type(config).__module__.split(".")[-2]
    if family in NO_INTERFACE:
        text = f"the experts of {family} do not use transformers' experts interface: they are neither computed nor "
        yield "problem", f"{text}taken over", ""
        return
    try:
        model = _made(config)
    except Exception as error:  # whatever a family raises for sizes that do not go together
        yield "problem", f"{type(config).__name__} gives no model: {str(error).splitlines()[0]}", ""
        return
    yield from _of(model)


def _made(config: Any) -> Any:
    """The model of a config without memory: of the class that it names, or that transformers chooses for it."""
    import torch
    import transformers

    named = [getattr(transformers, name) for name in config.architectures or () if hasattr(transformers, name)]
    autos = [getattr(transformers, name) for name in _AUTO if hasattr(transformers, name)]
    kinds = named or [auto._model_mapping[type(config)] for auto in autos if type(config) in auto._model_mapping]
    if not kinds:
        raise InputError(f"there is no model class for a {type(config).__name__} alone")
    of_text = kinds[0].config_class is not type(config)
    with torch.device("meta"):
        return kinds[0]._from_config(
            config.get_text_config() if of_text else config, dtype=config.dtype or torch.bfloat16
        )


def _of(model: Any) -> Iterator[Found]:
    from ..integrations.transformers import expert_form
    from ..integrations.transformers.moe_layers import moe_layers
    from ..nn import adapted

    name = type(model).__name__
    try:
        layers = moe_layers(model)
    except ReLibraError as error:
        yield "problem", f"{name}: {error}", ""
        return
    first = layers[0]
    ids = f"{layers[0].layer_id}..{layers[-1].layer_id}"
    yield "ok", f"{name}: {len(layers)} MoE layers ({ids}), top {first.top_k} of {first.num_experts} experts", ""
    try:
        form = expert_form(first.experts)
    except ReLibraError as error:
        yield "problem", f"kernels: {error}", "record and replay work all the same"
        return
    biases = "with" if form.has_bias else "without"
    gate = f"{form.activation}-gated" if form.has_gate else f"{form.activation} without a gate"
    yield "ok", f"kernels: ours compute its experts, {gate}, {biases} biases", ""
    weights = adapted(first.experts, form).tensors()
    elements = sum(weight[0].numel() for weight in weights)
    size, gradient = elements * weights[0].element_size(), elements * 4
    yield (
        "ok",
        f"a replica of an expert takes {size / MIB:.1f} MiB ({weights[0].dtype}), and its fp32 gradient "
        f"{gradient / MIB:.1f} MiB where it is kept or trained",
        "",
    )
    yield "ok", "record and replay: through the model's own routers", ""
    refusal = _refusal(first)
    if refusal:
        yield "note", f"no ExpertParallel: {refusal}", ""
        return
    decoder = model.get_submodule(first.name.partition(f".{first.layer_id}.")[0])
    if any(getattr(module, "is_causal", True) is False for module in decoder.modules()):
        text = "ExpertParallel: with every token recorded, the last ones too, since its attention looks both ways"
        yield "note", text, ""
    else:
        yield "ok", "ExpertParallel: the model is taken over where it is", ""
    yield from _configs(model)
    yield from _plan(layers, form)


def _refusal(layer: Any) -> str:
    """Why no plan is possible, or nothing."""
    from ..integrations.transformers.experts import refuse_norm

    there = len(layer.experts.down_proj)
    if layer.num_experts != there:
        return (
            f"its router chooses of {layer.num_experts}, but there are {there} experts: it may skip them, for which a "
            "plan has no place"
        )
    try:
        refuse_norm(layer.experts)
    except ReLibraError as error:
        return str(error)
    return ""


def _configs(model: Any) -> Iterator[Found]:
    """Which configs the GEMMs get on every GPU that has shipped ones."""
    if importlib.util.find_spec("triton") is None:
        yield "note", "configs: triton is not installed, so that no kernel is asked for its config", ""
        return
    from ..precompile import config_sources

    for device in sorted({path.parent.name for path in SHIPPED.glob("*/*.json")}):
        found = config_sources(model, TOKENS, device)
        sources = ", ".join(f"{kernel}: {' and '.join(found[kernel])}" for kernel in GEMM_KERNELS if kernel in found)
        yield "ok", f"configs on {device}, {TOKENS} tokens: {sources}", ""


def _plan(layers: Any, form: Any) -> Iterator[Found]:
    """Memory of the fullest rank under a plan of generated routing, as `ep.estimate` counts it."""
    experts, top_k, number = layers[0].experts, layers[0].top_k, layers[0].num_experts
    if number < RANKS or number <= 2 * top_k:
        yield "note", f"{number} experts are too few to estimate a plan of {RANKS} ranks", ""
        return
    weight = experts.down_proj[0]
    hidden, intermediate = tuple(weight.shape)[:: -1 if form.is_transposed else 1]
    shape = shape_of_sizes(hidden, intermediate, number, top_k, layers=len(layers), has_gate=form.has_gate)
    skew = min(7.3, number / top_k / 2)
    loads = generate_loads(len(layers), MICRO_BATCHES, number, top_k, TOKENS * RANKS, max_mean=skew)
    options = PlanOptions(balance=1.0, shape=shape)
    plan = plan_batch(loads, ClusterSpec(1, RANKS, SLOTS), options=options)
    found = estimate_plan(plan, loads, options.setting(number, RANKS))
    kinds = ("home_weights", "gradient", "kept", "fetched", "token_buffer", "activation")
    parts = ", ".join(f"{kind.replace('_', ' ')} {getattr(found, f'{kind}_bytes') / 1e9:.2f}" for kind in kinds)
    yield (
        "ok",
        f"a plan of {RANKS} GPUs in one node, {SLOTS} slots, {TOKENS} tokens a rank and micro-batch (modelled, of "
        f"generated routing with max/mean {skew:.1f}): {found.memory_bytes / 1e9:.2f} GB for a rank's experts: {parts}",
        "relibra estimate does this for your routing",
    )
