"""The results as tables, for a terminal and for `docs/benchmarks.md`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from .case import OK, STAGES, STATUSES, Result
from .shares import LAYER_TOKENS

Row = Sequence[Any]


def tables(results: Sequence[Result], *, brief: bool = False) -> str:
    """What ran, what is not ok, and the figures of every stage that has some, in Markdown.

    `brief`: kernels with one number of tokens only.
    """
    if not results:
        return "no case ran\n"
    if brief:
        results = [_briefly(result) for result in results]
    devices = sorted({result.device for result in results})
    parts = [f"Device: {', '.join(devices)}. {_versions(results)}", _counts(results), _faults(results)]
    makers: tuple[Callable[[Sequence[Result]], str], ...] = (_correct, _kernels, _layer, _versus, _tune, _step)
    parts += [make(results) for make in makers]
    return "\n\n".join(part for part in parts if part) + "\n"


def _briefly(result: Result) -> Result:
    times = [of for of in result.figures.get("times", ()) if of["tokens"] == LAYER_TOKENS]
    return replace(result, figures={**result.figures, "times": times}) if times else result


def _versions(results: Sequence[Result]) -> str:
    found = _figures(results, "smoke", "versions")
    peaks = next((r.figures for r in reversed(results) if r.case == "peaks" and r.status == OK), {})
    said = [f"{name} {found[name]}" for name in ("torch", "triton", "numpy", "transformers", "driver") if name in found]
    if peaks:
        said.append(f"{_text(peaks['matmul_tflops'])} TFLOP/s matmul, {_text(peaks['copy_tbs'])} TB/s copy")
    return ", ".join(said)


def _counts(results: Sequence[Result]) -> str:
    rows = []
    for stage in STAGES:
        of = [result for result in results if result.stage == stage]
        if of:
            counts = [sum(result.status == status for result in of) or "" for status in STATUSES]
            rows.append([stage, *counts, round(sum(result.seconds for result in of))])
    return _table(["stage", *STATUSES, "seconds"], rows)


def _faults(results: Sequence[Result]) -> str:
    bad = [r for r in results if r.status not in (OK, "missing", "not_reached") and not r.case.startswith("deliberate")]
    lines = [[r.stage, r.case, r.status, r.error.splitlines()[0][:160] if r.error else ""] for r in bad]
    return _table(["stage", "case", "status", "why"], lines)


def _correct(results: Sequence[Result]) -> str:
    rows = [
        [r.case, r.status, r.figures["worst_error"], r.figures.get("tolerance", "")]
        for r in results
        if r.stage == "correct" and "worst_error" in r.figures
    ]
    return _table(["against float64", "status", "worst relative error", "allowed"], rows)


def _kernels(results: Sequence[Result]) -> str:
    names = ("us", "low", "high", "how", "tflops", "gbs", "roofline", "of_cublas")
    rows = [
        [r.case, of["part"], of["tokens"], of["replicas"], *(of.get(name, "") for name in names)]
        for r in results
        if r.stage == "kernels"
        for of in r.figures.get("times", ())
    ]
    heads = ["kernel", "part", "tokens", "replicas", "us", "20 %", "80 %", "clock", "TFLOP/s", "GB/s", "of roofline",
             "of cuBLAS"]  # fmt: skip
    return _table(heads, rows)


def _layer(results: Sequence[Result]) -> str:
    names = ("forward_ms", "forward_tflops", "backward_ms", "backward_tflops", "step_ms", "host_inclusive_ms",
             "graph_ms", "roofline", "peak_mib", "kept_bytes_a_token", "same_again")  # fmt: skip
    rows = [
        [r.case.removeprefix("ours "), skew, *(figures.get(name, "") for name in names)]
        for r in _of(results, "layer", "ours ")
        for skew, figures in r.figures.items()
    ]
    heads = ["layer", "routing", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "step ms", "with the host ms",
             "graph ms", "of roofline", "peak MiB", "kept bytes a token", "same again"]  # fmt: skip
    return _table(heads, rows)


def _versus(results: Sequence[Result]) -> str:
    names = ("forward_ms", "our_forward_ms", "forward_ratio", "step_ms", "our_step_ms", "step_ratio", "step_noise",
             "difference")  # fmt: skip
    rows = [
        [r.case, skew, *(figures.get(name, "") for name in names)]
        for r in results
        if r.stage == "layer" and not r.case.startswith("ours ") and r.case != "peaks"
        for skew, figures in r.figures.items()
    ]
    heads = ["peer, layer", "routing", "forward ms", "ours", "ratio", "step ms", "ours", "ratio", "ours again",
             "difference"]  # fmt: skip
    return _table(heads, rows)


def _tune(results: Sequence[Result]) -> str:
    rows = [
        [r.case, f"{b['slots']} x {b['rows_per_slot']}", b["config"], b["us"], b["used_now"], f"{b['regret']:.1%}",
         b["rank_correlation"], len(b["timed"])]
        for r in results
        if r.stage == "tune"
        for b in r.figures.get("buckets", ())
    ]  # fmt: skip
    heads = ["launch", "slots x rows", "best", "us", "used now", "slower by", "rank correlation", "timed"]
    return _table(heads, rows)


def _step(results: Sequence[Result]) -> str:
    rows = []
    for r in results:
        if r.stage == "step" and "profile" in r.figures:
            profile, step_ms = r.figures["profile"], r.figures["step_ms"]
            ours = step_ms["relibra"] if isinstance(step_ms, dict) else step_ms
            names = ("launches", "span_ms", "busy_ms", "idle_ms")
            ratio = r.figures.get("ratio_to_grouped_mm", "")
            rows.append([r.case, ours, r.figures["tokens_per_second"], ratio, *(profile[name] for name in names)])
    heads = ["step", "ms", "tokens/s", "grouped_mm / ours", "launches", "span ms", "busy ms", "idle ms"]
    return _table(heads, rows)


def _of(results: Sequence[Result], stage: str, prefix: str) -> Iterable[Result]:
    return (result for result in results if result.stage == stage and result.case.startswith(prefix))


def _figures(results: Sequence[Result], stage: str, case: str) -> dict[str, Any]:
    return next((r.figures for r in results if (r.stage, r.case) == (stage, case)), {})


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")


def _table(heads: Sequence[str], rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *([_text(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
