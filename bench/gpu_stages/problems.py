"""Layers that the stages run: a rank's share of a model with its schedule, and every part of it as a call."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from relibra_kernels import kernels, reference
from relibra_kernels.form import GPT_OSS, ExpertForm
from relibra_kernels.kernels.constants import row_tiles
from relibra_kernels.schedule import Schedule
from relibra_kernels.tuning.catalogue import PARTS, Layer
from relibra_kernels.tuning.launch_model import skewed
from relibra_kernels.tuning.models import Model, model_named

from .setting import Setting

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TINY = {
    "qwen": Model("tiny", 32, 16, 4, 2),
    "gpt-oss": Model("tiny gpt-oss", 32, 16, 4, 2, GPT_OSS),
}
FORMS: dict[str, ExpertForm] = {
    "qwen": ExpertForm(),
    "bias": ExpertForm(has_bias=True),
    "interleaved": ExpertForm(is_concatenated=False),
    "transposed": ExpertForm(is_transposed=True),
    "clamped": ExpertForm(activation="clamped", limit=0.7),
    "clamped silu": ExpertForm(activation="clamped_silu", limit=0.7),
    "capped silu": ExpertForm(activation="capped_silu", limit=0.7),
    "gelu tanh": ExpertForm(activation="gelu_tanh"),
    "no gate": ExpertForm(activation="relu2"),
    "gpt-oss": GPT_OSS,
}


def model_of(setting: Setting, name: str) -> Model:
    """A model by name; in a rehearsal, a tiny one of its form."""
    real = model_named(name)
    return setting.size(real, TINY["gpt-oss" if real.form == GPT_OSS else "qwen"])


def slots_of_rows(rows: np.ndarray, top_k: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Assignments `[T, K]` with these group sizes, in a random but fixed order; -1 fills the last token up."""
    total = max(-(-int(rows.sum()) // top_k), 1) * top_k
    ids = torch.full((total,), -1, dtype=torch.int64)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    ids[order[: int(rows.sum())]] = torch.repeat_interleave(torch.arange(len(rows)), torch.from_numpy(rows))
    return ids.view(-1, top_k).to(device)


def schedule_of(rows: np.ndarray, top_k: int, device: torch.device) -> Schedule:
    return kernels.build_schedule(slots_of_rows(rows, top_k, device), len(rows), num_rows=int(rows.sum()))


def layer_of(
    setting: Setting,
    model: Model,
    rows: np.ndarray,
    *,
    replicas: int = 0,
    accumulate: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Layer:
    """A layer whose parts can be called, its slots filled by `rows`; weights of a trained size."""

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        if setting.device.type == "meta":
            return torch.empty(shape, device="meta", dtype=dtype)
        scale = 0.02 if len(shape) == 3 else 1.0
        return (torch.randn(shape, device=setting.device, dtype=torch.float32) * scale).to(dtype)

    schedule = schedule_of(rows, model.top_k, setting.device)
    how: dict[str, Any] = {"replicas": replicas, "accumulate": accumulate, "dtype": dtype, "make": make}
    return Layer(model.hidden_size, model.intermediate_size, model.form, schedule, **how)


def uneven(slots: int, rows: int) -> np.ndarray:
    """Group sizes as uneven as recorded ones, `rows` in all, the last slot empty."""
    groups = skewed(max(slots - 1, 1), max(rows // max(slots - 1, 1), 1))
    return np.append(groups, 0)[:slots] if slots > 1 else groups


def parts_of(model: Model, only: str = "") -> Iterator[tuple[str, str]]:
    """(kernel, part) of a layer of `model`."""
    for kernel, parts in PARTS.items():
        if (kernel == "grad_bias" and not model.form.has_bias) or (only and kernel != only):
            continue
        for part in parts:
            yield kernel, part


def flops_of(model: Model, kernel: str, part: str, rows: int) -> int:
    """Least FLOPs of a part: of its product, where it is one."""
    both = 2 if kernel == "gate_up" or part in ("dx", "gate_up") else 1
    product = kernel in ("gate_up", "grouped_gemm", "grad_hidden", "grad_weight")
    return 2 * rows * both * model.intermediate_size * model.hidden_size if product else 0


def least_bytes(call: partial, result: object, filled_slots: int, slots: int) -> int:
    """Every operand read once and every result written once; of stores of weights, the slots that have rows."""
    written = result if isinstance(result, tuple) else (result,)
    given = [*call.args, *call.keywords.values()]
    total = 0.0
    for tensor in (*given, *written):
        if isinstance(tensor, torch.Tensor):
            share = filled_slots / slots if tensor.ndim == 3 else 1.0
            total += tensor.numel() * tensor.element_size() * share
    for name in ("grad", "replica_grad"):  # written, and read where it is added to
        tensor = call.keywords.get(name)
        total += tensor.numel() * tensor.element_size() if tensor is not None and tensor.dtype == torch.float32 else 0
    return int(total)


def exact_twin(call: partial) -> partial:
    """The same call of the reference in float64, on copies."""

    def exact(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value.clone()
        return value

    keywords = {name: exact(value) for name, value in call.keywords.items() if name != "config"}
    return partial(getattr(reference, call.func.__name__), *map(exact, call.args), **keywords)


def copies(call: partial) -> partial:
    """The same call on copies of the buffers that it adds to."""
    keywords = {
        name: value.clone() if name in ("grad", "replica_grad") and value is not None else value
        for name, value in call.keywords.items()
    }
    return partial(call.func, *call.args, **keywords)


def outputs(call: partial) -> dict[str, torch.Tensor]:
    """Everything that a call computes, by name."""
    result = call()
    found: dict[str, torch.Tensor] = {}
    if isinstance(result, Schedule):
        found |= {name: getattr(result, name) for name in ("slot_offsets", "assignment_of", "position_of")}
        found |= {
            f"tiles {size}": row_tiles(result, size) for size in (16, 64, 128)
        }  # what there is, else made in torch
    elif isinstance(result, torch.Tensor):
        found["out"] = result
    else:
        found |= {f"out {i}": tensor for i, tensor in enumerate(result or ())}
    found |= {name: call.keywords[name] for name in ("grad", "replica_grad") if call.keywords.get(name) is not None}
    return found
