"""What the stages after `smoke` will launch, recorded on tensors without memory: it is compiled before they begin."""

from dataclasses import dataclass
from typing import Any

import torch

from relibra_kernels.compiling.compile_only import launch_digest
from relibra_kernels.configs.limits import Device
from relibra_kernels.kernels.launch import Launch, recording
from relibra_kernels.nn import ReplicatedExperts
from relibra_kernels.tuning.models import Model

from . import correct
from .layer_checks import LayerProblem, run_layer
from .problems import DTYPES, FORMS, layer_of, model_of, parts_of, uneven
from .rank_checks import adapted_experts
from .shares import LAYER_TOKENS, REPLICAS, SHARES, TOKENS
from .tiny_layer import call_all


@dataclass
class NoMemory:
    """A setting whose tensors have no memory."""

    rehearse: bool
    device: torch.device

    def size(self, real: Any, tiny: Any) -> Any:
        return tiny if self.rehearse else real


def launches_ahead(target: Device, rehearse: bool) -> list[Launch]:
    """Everything once, in the order in which it will be needed."""
    setting: Any = NoMemory(rehearse, torch.device("meta"))
    found: list[Launch] = []
    with recording(target, found.append):
        call_all(setting)
        _correct(setting)
        for share in SHARES[: setting.size(None, 1)]:
            model = model_of(setting, share.model)
            experts = setting.size(share.experts, 4)
            for tokens in setting.size(TOKENS, (16,)):
                for replicas in (0, REPLICAS):
                    _parts(setting, model, experts + replicas, tokens * model.top_k, replicas)
            _step(model, experts, setting.size(LAYER_TOKENS, 16))
    return list({launch_digest(launch): launch for launch in found}.values())


def _parts(setting: Any, model: Model, slots: int, rows: int, replicas: int, dtype: str = "bf16") -> None:
    layer = layer_of(setting, model, uneven(slots, rows), replicas=replicas, accumulate=True, dtype=DTYPES[dtype])
    for kernel, part in parts_of(model):
        if kernel != "schedule":  # that of the layer
            layer.call(kernel, part, None)()


def _correct(setting: Any) -> None:
    sizes = setting.size(correct.SIZES, ((13, 24, 20),))
    for form in setting.size(correct.FORMS, correct.FORMS[:1]):
        for dtype in setting.size(("bf16", "fp16", "fp32"), ("bf16",)):
            sampled = dtype != "bf16"
            if sampled and form not in ("qwen", "gpt-oss"):
                continue
            for size in sizes[:1] if sampled else sizes:
                problem = LayerProblem.make(setting, form, *size)
                for accumulate in (True, False):
                    run_layer(problem, dtype, accumulate=accumulate)
            if form in ("qwen", "gpt-oss"):
                hidden, half = sizes[0][1:]
                model = Model("odd", hidden, half, 7, 3, FORMS[form])
                for replicas in (0, 2):
                    _parts(setting, model, 7, 1500, replicas, dtype)
    for expert_form in (FORMS["qwen"], FORMS["gpt-oss"]):
        experts, (x, index, weights, _) = adapted_experts(setting, expert_form)
        experts(x.requires_grad_(), index, weights).sum().backward()


def _step(model: Model, experts: int, tokens: int) -> None:
    layer = ReplicatedExperts(
        experts, model.hidden_size, model.intermediate_size, form=model.form, dtype=torch.bfloat16, device="meta"
    )
    top_k = min(model.top_k, experts)
    x = torch.empty(tokens, model.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weights = torch.empty(tokens, top_k, dtype=torch.bfloat16, device="meta", requires_grad=True)
    layer(x, torch.empty(tokens, top_k, dtype=torch.int64, device="meta"), weights).sum().backward()
