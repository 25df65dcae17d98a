"""`relibra demo`: the whole loop on this machine's CPU.

A small Qwen3-MoE learns a toy task, samples rollouts while its routing is recorded, the batches are planned, and two
ranks train on them three ways: static placement, ReLibra plan, and routing balanced by force.
"""

import argparse
import time
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

from ...planner.errors import InputError

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder for plan, trace, plot and summary"
    )
    parser.add_argument("--training-steps", type=_positive, default=25, help="of the toy task, before the rollouts")
    parser.add_argument("--prompts", type=_positive, default=3, help="of each length, in a batch")
    parser.add_argument("--repeats", type=_positive, default=3, help="timed rounds of each of the three runs")
    parser.add_argument(
        "--time-limit",
        type=_positive,
        default=300,
        metavar="SECONDS",
        help="after it no further timed round begins, but the first; default 300",
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of the model's weights, the task and the sampling")


def _positive(text: str) -> int:
    return _integer(text, 1)


def _seed(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least {least}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    try:
        import matplotlib  # noqa: F401
        import tqdm  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{error.name} is not installed; the demo needs `pip install 'relibra-kernels[transformers,plot]'`"
        ) from None
    start = time.perf_counter()
    from . import ranks, report, rollout, toy
    from .policies import RANKS, make_policies

    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "summary.json").write_text("{}\n")  # found out now, not after two minutes
    except OSError as error:
        raise InputError(f"--out is {args.out}: it must be a folder that can be written ({error.strerror})") from None
    model = toy.build_model(args.seed)
    training = toy.train_on_task(model, args.training_steps, args.seed)
    loss = _progress("toy training", training, args.training_steps)
    batches = [
        _progress(
            f"rollouts of batch {i}", rollout.sample_rollouts(model, args.seed + i, args.prompts), len(toy.DIGITS)
        )
        for i in (1, 2)
    ]

    policies, plan_seconds = make_policies(batches)
    state = model.state_dict()
    reference = ranks.train_alone(state, batches)
    left = args.time_limit - (time.perf_counter() - start)
    steps = ranks.run_ranks(state, batches, policies, reference, args.repeats, left)
    results = _progress(f"training on {RANKS} ranks", steps, ranks.steps_to_run(args.repeats))

    batches[0].trace.save(args.out / "trace.npz")
    policies["planned"].plans[0].save(args.out / "plan.npz")
    summary = report.summarise(policies, results)
    summary |= {"repeats": args.repeats, "plan_seconds": plan_seconds, "task_loss": loss, "reward": batches[0].reward}
    report.plot_loads(policies, args.out / "loads.png")
    summary["seconds"] = time.perf_counter() - start
    report.save_summary(summary, args.out / "summary.json")
    print(report.table(summary))
    import torch

    if torch.cuda.is_available():
        print("\nThis ran on the CPU. `bash bench/gpu.sh` measures the kernels on the GPU here: docs/benchmarks.md.")
    print(f"\nSaved: {', '.join(sorted(str(path) for path in args.out.iterdir()))}")
    return 0


def _progress(label: str, steps: Generator[None, None, T], total: int) -> T:
    """Run `steps` with a progress bar; what they return."""
    from tqdm.auto import tqdm

    with tqdm(desc=f"{label:20}", total=total, bar_format="{desc} {bar:30} {n_fmt}/{total_fmt} {elapsed}") as bar:
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value
            bar.update()
