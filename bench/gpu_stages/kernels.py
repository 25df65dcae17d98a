"""How fast is each kernel: on a rank's share of three models, by tokens, with replicas and without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .case import Case
from .shares import REPLICAS, SHARES, TOKENS, Share

if TYPE_CHECKING:
    from .clock import Times
    from .setting import Setting

# in the order of what they cost
KERNELS = ("grad_weight", "gate_up", "grouped_gemm", "grad_hidden", "permute", "schedule", "swiglu", "grad_bias",
           "replica_reduce")  # fmt: skip
REHEARSED = (("grouped_gemm", SHARES[1]), ("permute", SHARES[0]))


def cases(rehearse: bool) -> list[Case]:
    found = [Case("peaks", "smoke.peaks", seconds=40, rehearsed=False)]
    for kernel in KERNELS:
        for share in SHARES:
            if kernel != "grad_bias" or share.model.startswith("gpt-oss"):
                options = {"model": share.model, "experts": share.experts, "kernel": kernel}
                rehearsed = (kernel, share) in REHEARSED
                found.append(Case(f"{kernel} {share.model}", "times", options, 45, rehearsed=rehearsed))
    return found


def times(setting: Setting, model: str, experts: int, kernel: str) -> None:
    """Every part for all numbers of tokens; rows are as uneven as recorded ones, and a slot is empty."""
    from .problems import model_of, parts_of, uneven

    of = model_of(setting, model)
    experts = setting.size(experts, 4)
    rows_found: list[dict] = []
    for tokens in setting.size(TOKENS, (16,)):
        for replicas in (0, REPLICAS):
            rows = uneven(experts + replicas, tokens * of.top_k)
            for name, part in parts_of(of, kernel):
                found = _time(setting, Share(model, experts), name, part, rows, replicas)
                rows_found.append({"part": part, "tokens": tokens, "replicas": replicas, **found})
                setting.report.figures(times=rows_found)


def _time(setting: Setting, share: Share, kernel: str, part: str, rows, replicas: int) -> dict:  # type: ignore[no-untyped-def]
    from .problems import flops_of, layer_of, least_bytes, model_of

    model = model_of(setting, share.model)
    layer = layer_of(setting, model, rows, replicas=replicas, accumulate=True)
    call = layer.call(kernel, part, None)
    least = least_bytes(call, call(), int((rows > 0).sum()), len(rows))
    calls = [call]
    while len(calls) < min(8, 1 + _l2_bytes(setting) * 2 // max(least, 1)):  # inputs must not stay in L2
        calls.append(layer.call(kernel, part, None))
    taken = setting.clock.of(calls, seconds=0.1)
    flops = flops_of(model, kernel, part, int(rows.sum()))
    figures: dict[str, object] = {**taken.figures(), "gbs": least / taken.median / 1e9}
    peak, copy = setting.known.get("matmul_tflops"), setting.known.get("copy_tbs")
    if peak and copy:
        figures["roofline"] = max(flops / peak / 1e12, least / copy / 1e12) / taken.median
    if flops:
        dense = _dense(setting, model, kernel, part, int(rows.sum()))
        figures |= {
            "tflops": flops / taken.median / 1e12,
            "cublas_us": 1e6 * dense.median,
            "of_cublas": dense.median / taken.median,
        }
    return figures


def _l2_bytes(setting: Setting) -> int:
    import torch

    return 0 if setting.rehearse else torch.cuda.get_device_properties(0).L2_cache_size


def _dense(setting: Setting, model, kernel: str, part: str, rows: int) -> Times:  # type: ignore[no-untyped-def]
    """One matrix product of the same FLOPs by torch, over the same rows: no grouped kernel is faster."""
    width = model.intermediate_size * (2 if kernel == "gate_up" or part in ("dx", "gate_up") else 1)
    rows = max(rows, 1)
    a, b = setting.randn(rows, model.hidden_size), setting.randn(model.hidden_size, width)
    if kernel == "grad_weight":
        left, right = a.t(), setting.randn(rows, width)
    elif kernel == "grouped_gemm":  # contracts over the width
        left, right = setting.randn(rows, width), b.t()
    else:
        left, right = a, b
    return setting.clock.of([lambda: left @ right], seconds=0.05)
