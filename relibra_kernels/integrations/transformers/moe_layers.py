"""What the MoE layers of a Hugging Face model are, whatever wraps the model or parts of it."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...nn import ReplicatedExperts
from ...parallel import checks
from ...planner import RoutingTrace
from ...planner.errors import InputError

# What PEFT, torch.compile, FSDP, DDP and checkpoint wrappers call the module that they wrap.
_WRAPPED = ("base_layer", "_orig_mod", "_fsdp_wrapped_module", "module", "_checkpoint_wrapped_module")
_PASSED_OVER = ("vision_moe",)  # ERNIE-VL: experts of image tokens, which no text token goes to


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer: the experts, the router beside them, and the number of the decoder layer they are in."""

    name: str
    layer_id: int
    experts: nn.Module
    router: nn.Module

    @property
    def num_experts(self) -> int:
        """What the router chooses from, over all ranks; ZAYA's last choice is to skip the experts."""
        return _num_experts(self.router)

    @property
    def top_k(self) -> int:
        return _top_k(self.router)

    @property
    def part(self) -> str:
        """Why the layer may run on a part of the tokens only; for messages."""
        if ".text_moe." not in self.name:
            return ""
        return (
            ": image tokens go to experts of their own (vision_moe), so that only a forward that is given the model's "
            "`moe_mm_token_type_ids` and no `rows` says which these are"
        )

    @property
    def device(self) -> torch.device:
        return next((parameter.device for parameter in self.router.parameters()), torch.device("cpu"))


def _num_experts(router: Any) -> int:
    for name in ("num_router_classes", "num_experts"):
        if isinstance(count := getattr(router, name, None), int):
            return count
    if getattr(router, "weight", None) is not None:
        return int(router.weight.shape[0])
    return int(router.config.num_experts)  # Gemma 4 looks both numbers up


def _top_k(router: Any) -> int:
    return int(router.top_k if hasattr(router, "top_k") else router.config.top_k_experts)


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """The MoE layers of a model in order. Raises: InputError where it has none, or experts without a router."""
    modules = dict(model.named_modules())
    layers: list[MoeLayer] = []
    for name, experts in modules.items():
        if not isinstance(experts, ReplicatedExperts) and not {"has_gate", "config"} <= set(vars(experts)):
            continue  # by its own attributes: wrappers pass those of the experts on
        path = name.split(".")
        while path[-1] in _WRAPPED:
            path.pop()
        block = modules[".".join(path[:-1])]
        if len(path) > 1 and path[-2] in _PASSED_OVER:
            continue
        router = next((unwrapped(getattr(block, key)) for key in ("gate", "router") if hasattr(block, key)), None)
        if router is None or not _says(_top_k, router):
            raise InputError(f"{name} ({type(experts).__name__}) has no router as `gate` or `router` beside it")
        if not _says(_num_experts, router):
            raise InputError(f"{name} has a router ({type(router).__name__}) that does not say how many experts it has")
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.)", name)
        layers.append(MoeLayer(name, int(numbers[-1]) if numbers else len(layers), experts, router))
    if not layers:
        raise InputError(
            f"model is a {type(model).__name__} without experts that transformers or we compute: it is dense, and has "
            "no MoE layer, or another library replaced them (Liger does with swiglu=True): switch that off"
        )
    return layers


def _says(number: Callable[[Any], int], router: nn.Module) -> bool:
    try:
        return number(router) > 0
    except AttributeError:
        return False


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of its wrappers (torch.compile, DDP, ...)."""
    while True:
        inner = next((module._modules[key] for key in _WRAPPED if module._modules.get(key) is not None), None)
        if inner is None:
            return module
        module = inner


def model_inside(model: nn.Module) -> nn.Module:
    """The model that `generate` and every wrapper's forward call in the end."""
    while True:
        inner = unwrapped(model)
        if type(inner).__module__.split(".")[0] == "peft":
            children = inner._modules
            inner = next((child for key in ("base_model", "model") if (child := children.get(key)) is not None), inner)
        if inner is model:
            return model
        model = inner


@contextmanager
def not_compiled(model: nn.Module) -> Iterator[None]:
    """Within, what torch.compile made runs as it was written: compiled code would not see new hooks."""
    compiled = any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def check_trace_of_model(trace: RoutingTrace, layers: list[MoeLayer]) -> None:
    """Refuse a trace of another model."""
    first = layers[0]
    checks.check_trace(trace, len(layers), first.top_k, first.num_experts, [layer.layer_id for layer in layers])
