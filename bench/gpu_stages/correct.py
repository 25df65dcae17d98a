"""Every kernel and layer against float64, twice with the same bits; and what must hold of a step on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .case import Case, Wrong

if TYPE_CHECKING:
    from .setting import Setting

# kernel -> relative error against float64 in the Frobenius norm, by the dtype of its operands; one product each
TOLERANCE = {"bf16": 1.0e-2, "fp16": 2e-3, "fp32": 1e-5}
LAYER_TOLERANCE = {"bf16": 1.5e-2, "fp16": 2e-3, "fp32": 1e-5}
CLAMPED = ("clamped", "clamped silu", "capped silu")  # at a limit that many rows meet
REHEARSED = (("schedule", "bf16"), ("grad_hidden", "fp16"))
FORMS = ("qwen", "bias", "interleaved", "transposed", *CLAMPED, "gelu tanh", "no gate", "gpt-oss")
KERNELS = ("schedule", "permute", "gate_up", "swiglu", "grouped_gemm", "grad_hidden", "grad_weight", "grad_bias",
           "replica_reduce")  # fmt: skip
# tokens, hidden size, intermediate size: rows of 16 bytes that are no multiple of a block; rows that no descriptor
# takes; gpt-oss's width, no multiple of 128
SIZES = ((1001, 1432, 360), (517, 1431, 357), (2047, 2880, 768))


def cases(rehearse: bool) -> list[Case]:
    sizes = ((7, 24, 20),) if rehearse else SIZES
    dtypes = [(name, "bf16") for name in KERNELS]
    dtypes += [(name, dtype) for name in ("gate_up", "grad_hidden", "grad_weight") for dtype in ("fp16", "fp32")]
    found = [
        Case(
            f"kernel {kernel} {dtype}",
            "kernel",
            {"kernel": kernel, "dtype": dtype},
            90,
            beside=True,
            rehearsed=(kernel, dtype) in REHEARSED,
        )
        for kernel, dtype in dtypes
    ]
    found += [
        Case(
            f"layer {form} bf16",
            "layers",
            {"form": form, "dtype": "bf16", "sizes": sizes},
            90,
            beside=True,
            rehearsed=form == "gpt-oss",
        )
        for form in FORMS
    ]
    found += [
        Case(
            f"layer {form} {dtype}",
            "layers",
            {"form": form, "dtype": dtype, "sizes": sizes[:1]},
            90,
            beside=True,
            rehearsed=False,
        )
        for form in ("qwen", "gpt-oss")
        for dtype in ("fp16", "fp32")
    ]
    found += [
        Case(name.replace("_", " "), name, beside=True, seconds=90, rehearsed=name == "wide_block_k")
        for name in (
            "recompute",
            "fewer_rows_than_assignments",
            "weights_that_are_views",
            "wide_block_k",
            "fp32_precision_setting",
        )
    ]
    found += [
        Case(name.replace("_", " "), f"rank_checks.{name}", beside=True, seconds=90, rehearsed=name == "payload")
        for name in ("payload", "packed_replicas", "adapters")
    ]
    alone = ("second_stream", "device_by_index", "step_without_waiting", "compiled_after_warmup", "graph_of_a_layer")
    return found + [
        Case(
            name.replace("_", " "),
            f"conditions.{name}",
            seconds=60,
            rehearsed=name in ("device_by_index", "graph_of_a_layer"),
        )
        for name in alone
    ]


def errors(
    setting: Setting, got: dict[str, Any], expected: dict[str, Any], rows: int | None = None
) -> dict[str, float]:
    """Relative error of every output; integers must be equal. `rows`: what is beyond is undefined."""
    import torch

    found = {}
    for name, value in got.items():
        other = expected[name]
        if rows is not None and name.startswith("out") and value.ndim == 2 and len(value) >= rows:
            value, other = value[:rows], other[:rows]
        if not value.is_floating_point():
            found[name] = 0.0 if torch.equal(value.cpu(), other.cpu()) else float("inf")
            continue
        scale = other.double().norm()
        error = (value.double() - other.double()).norm() / (scale if scale > 0 else 1)
        found[name] = float(error) if torch.isfinite(error) else float("inf")
    return found


def check(setting: Setting, what: str, found: dict[str, float], tolerance: float) -> None:
    """Raises Wrong where an error is above `tolerance`, with all of them."""
    # the interpreter truncates where it stores bf16: twice the error
    most = max(found.values())
    if most > tolerance * setting.size(1, 4):
        raise Wrong(f"{what}: relative error above {tolerance:g}: {found}")


def kernel(setting: Setting, kernel: str, dtype: str) -> None:
    """All parts of a kernel in two forms, with replicas and without, in odd sizes and twice."""
    from relibra_kernels.tuning.models import Model

    from .problems import DTYPES, FORMS, copies, exact_twin, layer_of, outputs, parts_of, uneven

    worst, calls = 0.0, 0
    for form in setting.size(("qwen", "gpt-oss"), ("gpt-oss",)):
        hidden, half = setting.size((1432, 360), (24, 20))
        model = Model("odd", hidden, half, 7, 3, FORMS[form])
        for replicas in (0, 2):
            rows = uneven(7, setting.size(1500, 30))
            layer = layer_of(setting, model, rows, replicas=replicas, accumulate=replicas > 0, dtype=DTYPES[dtype])
            used = int(layer.schedule.slot_offsets[-1])
            for of, part in parts_of(model, kernel):
                call = layer.call(of, part, None)
                exact = outputs(exact_twin(call))
                first, second = outputs(copies(call)), outputs(copies(call))
                what = f"{of} {part}, {form}, {replicas} replicas, {dtype}"
                found = errors(setting, first, exact, used)
                worst, calls = max(worst, *found.values()), calls + 1
                setting.report.figures(worst_error=worst, calls=calls)
                check(setting, what, found, TOLERANCE[dtype])
                same_bits(what, first, second, used)
    setting.report.figures(tolerance=TOLERANCE[dtype], same_bits=True)


def same_bits(what: str, first: dict[str, Any], second: dict[str, Any], rows: int | None = None) -> None:
    import torch

    for name, value in first.items():
        other = second[name]
        if rows is not None and name.startswith("out") and value.ndim == 2 and len(value) >= rows:
            value, other = value[:rows], other[:rows]
        if not torch.equal(value, other):
            raise Wrong(f"{what}: {name} has other bits the second time")


def layers(setting: Setting, form: str, dtype: str, sizes: list[list[int]]) -> None:
    """The two functions of a layer with replicas and dropped assignments, against the reference in float64."""
    from .layer_checks import LayerProblem, exact_layer, run_layer

    worst: dict[str, float] = {}
    for tokens, hidden, half in sizes:
        problem = LayerProblem.make(setting, form, tokens, hidden, half)
        expected = exact_layer(problem)
        for accumulate in setting.size((True, False), (True,)):
            first, second = (run_layer(problem, dtype, accumulate=accumulate) for _ in range(2))
            what = f"{form} {dtype} T={tokens} H={hidden} I={half} accumulate={accumulate}"
            if form in CLAMPED:
                expected = exact_layer(problem, first["h"])
            found = errors(setting, first, expected)
            worst = {name: max(error, worst.get(name, 0.0)) for name, error in found.items()}
            setting.report.figures(errors=worst, worst_error=max(worst.values()))
            check(setting, what, found, LAYER_TOLERANCE[dtype])
            same_bits(what, first, second)
    setting.report.figures(tolerance=LAYER_TOLERANCE[dtype], same_bits=True)


def recompute(setting: Setting) -> None:
    """h that is computed again in backward gives the same bits."""
    from .layer_checks import LayerProblem, exact_layer, run_layer

    problem = LayerProblem.make(setting, "gpt-oss", *setting.size((1001, 1432, 360), (13, 24, 20)))
    kept, again = (run_layer(problem, "bf16", recompute=flag) for flag in (False, True))
    same_bits("recompute", kept, again)
    found = errors(setting, again, exact_layer(problem))
    setting.report.figures(errors=found, worst_error=max(found.values()))
    check(setting, "recompute", found, LAYER_TOLERANCE["bf16"])


def fewer_rows_than_assignments(setting: Setting) -> None:
    """Ragged buffers of as many rows as are not dropped, for row counts of both parities."""
    from .layer_checks import LayerProblem, exact_layer, run_layer

    worst = 0.0
    for more in range(4):
        sizes = setting.size((501 + more, 1432, 360), (9 + more, 24, 20))
        problem = LayerProblem.make(setting, "qwen", *sizes, dropped=0.4)
        found = errors(setting, run_layer(problem, "bf16", exact_rows=True), exact_layer(problem))
        worst = max(worst, *found.values())
        check(setting, f"{problem.rows} rows", found, LAYER_TOLERANCE["bf16"])
    setting.report.figures(worst_error=worst, tolerance=LAYER_TOLERANCE["bf16"])


def weights_that_are_views(setting: Setting) -> None:
    """Contiguous weights that begin at 2, 8 and 16 bytes: right, or refused by name."""
    from relibra_kernels import ReLibraError

    from .layer_checks import LayerProblem, exact_layer, run_layer

    outcomes: dict[str, float | str] = {}
    problem = LayerProblem.make(setting, "qwen", *setting.size((301, 1432, 360), (9, 24, 20)))
    expected = exact_layer(problem)
    for elements in (8, 4, 1):
        try:
            found = errors(setting, run_layer(problem, "bf16", offset=elements), expected)
        except ReLibraError as error:
            outcomes[f"{2 * elements} bytes"] = f"refused: {error}"[:200]
        else:
            outcomes[f"{2 * elements} bytes"] = max(found.values())
            check(setting, f"weights at {2 * elements} bytes", found, LAYER_TOLERANCE["bf16"])
        setting.report.figures(**outcomes)


def wide_block_k(setting: Setting) -> None:
    """H 2880 in blocks of 128, no multiple: rows picked by descriptor lose their end on some compilers."""
    from relibra_kernels.configs.config import parse_config
    from relibra_kernels.tuning.models import Model

    from .problems import FORMS, copies, exact_twin, layer_of, outputs, uneven

    model = Model("wide", *setting.size((2880, 360), (24, 20)), 7, 3, FORMS["gpt-oss"])
    layer = layer_of(setting, model, uneven(7, setting.size(900, 30)))
    used, worst = int(layer.schedule.slot_offsets[-1]), 0.0
    config = parse_config(setting.size("64x64x128w4s2", "16x16x16w4s1"))
    for kernel, part in (("gate_up", "gate_up"), ("grad_hidden", "grad_hidden"), ("grouped_gemm", "down")):
        call = layer.call(kernel, part, config)
        found = errors(setting, outputs(copies(call)), outputs(exact_twin(call)), used)
        worst = max(worst, *found.values())
        setting.report.figures(worst_error=worst)
        check(setting, f"{kernel} with {config}", found, TOLERANCE["bf16"])


def fp32_precision_setting(setting: Setting) -> None:
    """fp32 layers under torch's new and old switches of tf32: none raises, and each is as precise as it says."""
    import torch

    from .layer_checks import LayerProblem, exact_layer, run_layer

    problem = LayerProblem.make(setting, "qwen", *setting.size((301, 512, 256), (9, 24, 20)))
    expected, found = exact_layer(problem), {}
    for name, tolerance in (("ieee", LAYER_TOLERANCE["fp32"]), ("tf32", 5e-3)):
        torch.backends.cuda.matmul.fp32_precision = name
        error = max(errors(setting, run_layer(problem, "fp32"), expected).values())
        found[name] = error
        setting.report.figures(**found)
        check(setting, f"fp32_precision = {name}", {"worst": error}, tolerance)
