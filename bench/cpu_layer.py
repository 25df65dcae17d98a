"""Forward + backward of one layer's experts on a CPU thread, against transformers' built-in implementations.

    python bench/cpu_layer.py [--rounds 3] [--tokens 4096] [--built-in]

Tokens, H 2048, I 768, 32 experts, top-8, bf16. Implementations take turns, so that a busy machine slows all of
them; best and worst of the rounds are shown. transformers' batched_mm is left out: it gathers the weights of every
assignment, 206 GB at 4096 tokens. Without AVX-512 torch multiplies bf16 in plain loops, and transformers takes minutes
a round. The last line is a JSON object.
"""

import argparse
import json
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from relibra_kernels.cli.bench.layers import Model, make_layer
from relibra_kernels.cli.bench.peers import implementations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--built-in", action="store_true", help="leave out the loop and the plain grouped_mm")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens, model = args.tokens, Model("Qwen3-30B-A3B, 32 experts", 2048, 768, 32, 8)
    few, layer = (
        make_layer(model, count, 0.5, num_experts=32, dtype=torch.bfloat16, device="cpu") for count in (32, tokens)
    )
    runs = {
        id(some): {
            name: run
            for name, run in implementations(some.experts).items()
            if not args.built_in or name == "relibra" or name.startswith("transformers")
        }
        for some in (few, layer)
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs[id(layer)]}
    for warms_up in (True, *[False] * args.rounds):
        some = few if warms_up else layer
        for name, run in runs[id(some)].items():
            start = time.perf_counter()
            run(some.x, some.indices, some.weights).backward(some.dout)
            if not warms_up:
                seconds[name].append(time.perf_counter() - start)
            some.clear()
    print(f"{'implementation':28} {'best s':>8} {'worst s':>8} {'GFLOP/s':>8} {'relibra is':>11}")
    ours = min(seconds["relibra"])
    for name, times in seconds.items():
        rate = model.flops(tokens) / min(times) / 1e9
        print(f"{name:28} {min(times):8.2f} {max(times):8.2f} {rate:8.0f} {min(times) / ours:10.2f}x")
    built_in = {name: min(times) for name, times in seconds.items() if name.startswith("transformers")}
    best = min(built_in, key=built_in.__getitem__)
    print(json.dumps({"relibra_s": ours, "best_built_in": best, "best_built_in_s": built_in[best],
                      "ratio": built_in[best] / ours}))  # fmt: skip


if __name__ == "__main__":
    main()
