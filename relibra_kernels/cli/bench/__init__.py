"""`relibra bench`: our experts on this machine, against transformers' and what else is installed."""

import argparse
import json

from ...planner.errors import InputError
from ..inputs import SHAPE_HELP, naming_flags

_DTYPES = ("bf16", "fp16", "fp32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", "--shape", default="Qwen3-30B-A3B", help=f"{SHAPE_HELP}; default Qwen3-30B-A3B")
    parser.add_argument("--tokens", type=int, metavar="N", help="of a micro-batch; default 8192, on a CPU 256")
    parser.add_argument("--experts", type=int, metavar="E", help="of the layer on this rank; default all, on a CPU 16")
    parser.add_argument("--skew", type=float, default=1.1, help="log-normal width of popularity; default 1.1")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="default bf16")
    parser.add_argument("--rounds", type=int, default=5, help="implementations take turns in each; default 5")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cuda or cpu")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    for name in ("tokens", "experts", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}, but must be at least 1")
    import torch

    from ...tuning.models import model_named
    from .clock import lines_of, measure, verdict
    from .layers import make_layer
    from .peers import implementations

    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = here if args.device == "auto" else args.device
    if device not in ("cuda", "cpu") or (device == "cuda" and here == "cpu"):
        raise InputError(f"--device is {args.device!r}, but must be auto or cpu{', or cuda' if here == 'cuda' else ''}")
    with naming_flags(model="--model"):
        model = model_named(args.model)
    experts = min(args.experts or (16 if device == "cpu" else model.num_experts), model.num_experts)
    tokens = args.tokens or (256 if device == "cpu" else 8192)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    layer = make_layer(model, tokens, args.skew, num_experts=experts, dtype=dtype, device=device)
    runs = implementations(layer.experts)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}: {tokens} tokens, {min(model.top_k, experts)} of {experts} experts of {model}, {args.dtype}; measured "
        f"here, {args.rounds} rounds in turns, median and (least to most)",
        flush=True,
    )
    found = measure(layer, runs, args.rounds)
    print("\n".join(lines_of(found, tokens * min(model.top_k, experts), layer)))
    if "transformers grouped_mm" in found:
        print(verdict(found, "transformers grouped_mm"))
    missing = [peer for peer in ("transformers grouped_mm", "liger", "scattermoe", "sonic-moe") if peer not in found]
    if missing:
        print(f"not compared (not installed, or not for this layer or device): {', '.join(missing)}")
    if args.json:
        print(json.dumps({peer: figures.record() for peer, figures in found.items()}))
    return 0
