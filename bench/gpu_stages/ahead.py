"""What the stages after `smoke` will launch, recorded on tensors without memory: it is compiled before they begin."""

from collections.abc import Iterator

import torch

from relibra_kernels import kernels
from relibra_kernels.compiling.compile_only import launch_digest
from relibra_kernels.configs.limits import Device
from relibra_kernels.kernels.launch import Launch, recording
from relibra_kernels.nn import ReplicatedExperts
from relibra_kernels.tuning.catalogue import Layer, meta
from relibra_kernels.tuning.models import Model, model_named

from .problems import TINY, parts_of
from .shares import LAYER_TOKENS, REPLICAS, SHARES, TOKENS


def launches_ahead(target: Device, rehearse: bool) -> list[Launch]:
    """Everything once, the largest layers last."""
    found: list[Launch] = []
    with recording(target, found.append):
        for model, experts, counts in _models(rehearse):
            for tokens in counts:
                for replicas in (0, REPLICAS):
                    _record_parts(model, experts, tokens, replicas)
            for recompute in (False, True):
                _record_step(model, experts, counts[-1] if rehearse else LAYER_TOKENS, recompute)
    return list({launch_digest(launch): launch for launch in found}.values())


def _models(rehearse: bool) -> Iterator[tuple[Model, int, tuple[int, ...]]]:
    if rehearse:
        yield TINY["qwen"], 4, (16,)
        return
    for share in SHARES:
        yield model_named(share.model), share.experts, TOKENS


def _record_parts(model: Model, experts: int, tokens: int, replicas: int) -> None:
    slots, top_k = experts + replicas, model.top_k
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device="meta")
    schedule = kernels.build_schedule(ids, slots, num_rows=tokens * top_k)
    for accumulate in (False, True):
        layer = Layer(
            model.hidden_size, model.intermediate_size, model.form, schedule, replicas, accumulate, make=meta
        )
        for kernel, part in parts_of(model):
            if kernel != "schedule":  # above
                layer.call(kernel, part, None)()


def _record_step(model: Model, experts: int, tokens: int, recompute: bool) -> None:
    layer = ReplicatedExperts(
        experts, model.hidden_size, model.intermediate_size, form=model.form, recompute=recompute,
        dtype=torch.bfloat16, device="meta",
    )  # fmt: skip
    x = meta(tokens, model.hidden_size).requires_grad_()
    weights = meta(tokens, min(model.top_k, experts)).requires_grad_()
    ids = torch.empty(tokens, min(model.top_k, experts), dtype=torch.int64, device="meta")
    layer(x, ids, weights).sum().backward()
