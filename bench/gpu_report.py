"""Forward and backward of one layer on this GPU: TFLOP/s, fraction of the roofline, ratio to the best peer; JSON.

    python bench/gpu_report.py [--json FILE] [--seconds 240]

One rank of 8 of each model (experts / 8), 8192 tokens a rank, bf16, balanced and skewed routing. Implementations take
turns round by round; medians, with the spread from best to worst. The roofline is measured first on this device: a
large bf16 matmul, and a copy. A layer's bound is the slower of its FLOPs and of its smallest traffic.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from models import MODELS, Layer, Model, make_layer
from peers import Implementation, implementations

TOKENS, ROUNDS = 8192, 7


def seconds_of(call) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def device_peaks() -> tuple[float, float]:
    """(FLOP/s of a bf16 matmul, bytes/s of a copy) of this device."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    big = torch.empty(1 << 30, device="cuda", dtype=torch.int8)
    flops = 2 * 8192**3 / min(seconds_of(lambda: a @ a) for _ in range(10))
    bandwidth = 2 * big.numel() / min(seconds_of(lambda: big.clone()) for _ in range(10))
    return flops, bandwidth


def least_bytes(model: Model, layer: Layer) -> int:
    """Forward and backward: weights read three times and their gradients written, x, dout, out, dx, and h twice."""
    weights = sum(parameter.numel() for parameter in layer.experts.parameters())
    rows = layer.indices.numel()
    return 2 * (4 * weights + 4 * layer.x.numel() + 3 * rows * 2 * model.intermediate_size)


def step(run: Implementation, layer: Layer) -> None:
    run(layer.experts, layer.x, layer.indices, layer.weights).backward(layer.dout)


def measure(model: Model, skew: float, peaks: tuple[float, float]) -> dict:
    experts = model.num_experts // 8
    layer = make_layer(model, TOKENS, skew, num_experts=experts, dtype=torch.bfloat16, device="cuda")
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, run in implementations(model.form.activation == "silu").items():
        try:
            step(run, layer)  # compiles
            torch.cuda.synchronize()
            times[name] = []
        except Exception as error:
            if name == "relibra":
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:200]
        layer.clear()
    for _ in range(ROUNDS):
        for name, of in times.items():
            run = implementations(model.form.activation == "silu")[name]
            of.append(seconds_of(lambda run=run: step(run, layer)))
            layer.clear()
    flops = model.flops(TOKENS) * layer.indices.shape[1] // model.top_k
    bound = max(flops / peaks[0], least_bytes(model, layer) / peaks[1])
    middle = {name: median(of) for name, of in times.items()}
    ours = middle["relibra"]
    peers = {name: value for name, value in middle.items() if name != "relibra"}
    best = min(peers, key=peers.__getitem__) if peers else None
    return {
        "model": model.name,
        "skew": skew,
        "seconds": {name: [min(of), middle[name], max(of)] for name, of in times.items()},
        "tflops": flops / ours / 1e12,
        "roofline": bound / ours,
        "best_peer": best,
        "ratio": peers[best] / ours if best else None,
        "failed": failed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--seconds", type=float, default=240, help="start no further layer after this long")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU here", file=sys.stderr)
        return 2
    begun, peaks = time.monotonic(), device_peaks()
    device = torch.cuda.get_device_name()
    print(f"{device}: {peaks[0] / 1e12:.0f} TFLOP/s bf16 matmul, {peaks[1] / 1e12:.2f} TB/s copy")
    print(f"{'model':20} {'skew':>5} {'ms':>8} {'spread':>7} {'TFLOP/s':>8} {'roofline':>8}  best peer (ratio)")
    results, skipped = [], []
    for model in MODELS:
        for skew in (0.0, 1.1):
            if time.monotonic() - begun > args.seconds:
                skipped.append(f"{model.name} skew {skew}")
                continue
            found = measure(model, skew, peaks)
            low, middle, high = (1e3 * value for value in found["seconds"]["relibra"])
            peer = f"{found['best_peer']} ({found['ratio']:.2f}x)" if found["best_peer"] else "none"
            print(
                f"{model.name:20} {skew:5.1f} {middle:8.2f} {(high - low) / middle:7.1%} {found['tflops']:8.0f} "
                f"{found['roofline']:8.1%}  {peer}",
                flush=True,
            )
            results.append(found)
            torch.cuda.empty_cache()
    if skipped:
        print(f"not measured, out of time: {', '.join(skipped)}")
    if args.json:
        about = {"device": device, "torch": torch.__version__, "matmul_flops": peaks[0], "copy_bytes": peaks[1]}
        args.json.write_text(json.dumps({**about, "results": results, "skipped": skipped}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
