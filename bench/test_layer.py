"""Forward + backward of one layer's experts over the shapes of real models, beside its peers: `pytest bench/`.

On a GPU: one rank of 8 with 8192 tokens. On a CPU: two experts and 128 tokens, which compares implementations and not
devices. Balanced routing, and routing as skewed as recorded rollouts (expert max/mean about 7 for 128 experts).
"""

import pytest
import torch

from relibra_kernels.cli.bench.layers import MODELS, Model, make_layer
from relibra_kernels.cli.bench.peers import PEERS, Build, Unsuitable, relibra

GPU = torch.cuda.is_available()
SKEWS = {"balanced": 0.0, "skewed": 1.1}


CASES = [
    pytest.param(model, skew, build, id=f"{model}-{skew}-{name}")
    for model in MODELS
    for skew in SKEWS
    for name, build in {"relibra": relibra, **PEERS}.items()
]


@pytest.mark.parametrize(("model", "skew", "build"), CASES)
def test_forward_and_backward(benchmark, model: Model, skew: str, build: Build):
    tokens, experts = (8192, model.num_experts // 8) if GPU else (128, 2)
    layer = make_layer(
        model, tokens, SKEWS[skew], num_experts=experts, dtype=torch.bfloat16, device="cuda" if GPU else "cpu"
    )
    try:
        run = build(layer.experts)
    except (ImportError, Unsuitable) as error:
        pytest.skip(str(error))

    def step() -> None:
        run(layer.x, layer.indices, layer.weights).backward(layer.dout)
        layer.clear()
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{model.name}, {skew}"
    benchmark.pedantic(step, rounds=10 if GPU else 2, warmup_rounds=3 if GPU else 1)
