"""Steps of MoE layers on expert-parallel CPU ranks: static placement, our plan, forced balance, and transformers' EP.

    python bench/ep.py --ranks 2 --json

Each rank is a process of one thread. A step is forward and backward of every layer and micro-batch with all that the
runtime does for it: migration, tables, replicas. Two batches are trained on in turns, each under the plan of least time
for these ranks, or with `--balance 1` of full balance; planning is not timed. The variants take turns within each
repeat, so that a slow moment of the machine hits all alike, in orders in which each follows each other one equally
often: what a step leaves in the caches and in the allocator slows or speeds the next. `plain_a2a` is transformers'
built-in `AllToAllEP` around the same experts, on the balanced routing. CPU seconds are those of all threads of all
ranks; with tiny experts (`--tokens 256 --hidden 64 --intermediate 32`) they are what the runtime itself takes. With
--json, the last line is a JSON object; everything in it is measured.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from relibra_kernels.nn import ReplicatedExperts, ReplicatedMoE, TopKRouter
from relibra_kernels.parallel import ExpertParallel, RuntimeOptions
from relibra_kernels.planner import (
    BatchPlan,
    ClusterSpec,
    PlanOptions,
    RoutingTrace,
    count_loads,
    static_plan,
)

BATCHES = 2
# A Latin square balanced for what comes before: E. J. Williams, Australian Journal of Scientific Research 2 (1949)
ORDERS = (0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1)


@dataclass(frozen=True)
class Shape:
    """Sizes of the run. tokens: of one rank and micro-batch."""

    ranks: int
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int
    micro_batches: int


class Layers(nn.Module):
    """MoE layers, one after the other: `[T, H] -> [T, H]`."""

    def __init__(self, shape: Shape):
        super().__init__()
        torch.manual_seed(0)
        self.moe = nn.ModuleList(
            ReplicatedMoE(
                TopKRouter(shape.hidden, shape.experts, shape.top_k),
                ReplicatedExperts(shape.experts, shape.hidden, shape.intermediate),
            )
            for _ in range(shape.layers)
        )

    def forward(self, x_TH: Tensor) -> Tensor:
        for moe in self.moe:
            x_TH = x_TH + moe(x_TH)
        return x_TH


def skewed_trace(shape: Shape, batch: int) -> RoutingTrace:
    """One sequence for each rank and micro-batch. Hot experts are near each other, and change between micro-batches."""
    random = np.random.default_rng([batch, 1])
    ids = np.empty((shape.ranks * shape.micro_batches, shape.tokens, shape.layers, shape.top_k), np.int16)
    for layer in range(shape.layers):
        home = random.permutation(shape.ranks)[0] * (shape.experts // shape.ranks)
        near = np.isin(np.arange(shape.experts), home + np.arange(shape.experts // shape.ranks))
        popularity = random.normal(0, 0.8, shape.experts) + 1.9 * near
        for m in range(shape.micro_batches):
            drift = popularity + random.normal(0, 0.5, shape.experts)
            for rank in range(shape.ranks):
                gumbel = random.gumbel(size=(shape.tokens, shape.experts)) + drift
                ids[m * shape.ranks + rank, :, layer] = np.argsort(-gumbel, 1)[:, : shape.top_k]
    return _trace(ids, shape)


def balanced_trace(shape: Shape) -> RoutingTrace:
    """Every expert gets the same; the experts of a token lie apart, so that it visits as many ranks as it can."""
    turn = np.arange(shape.tokens)[:, None] + np.arange(shape.top_k) * (shape.experts // shape.top_k)
    ids = np.broadcast_to(
        (turn % shape.experts)[None, :, None],
        (shape.ranks * shape.micro_batches, shape.tokens, shape.layers, shape.top_k),
    )
    return _trace(ids.astype(np.int16), shape)


def _trace(ids_STLK: np.ndarray, shape: Shape) -> RoutingTrace:
    offsets = np.arange(len(ids_STLK) + 1) * shape.tokens
    return RoutingTrace(ids_STLK.reshape(-1, *ids_STLK.shape[2:]), offsets, shape.experts, tuple(range(shape.layers)))


def micro_batch_of_sequence(shape: Shape) -> np.ndarray:
    return np.repeat(np.arange(shape.micro_batches), shape.ranks)


class OurRun:
    """One policy on one rank: static placement, or the plan that `goal` asks for."""

    def __init__(self, shape: Shape, traces: list[RoutingTrace], options: RuntimeOptions, goal: PlanOptions | None):
        cluster, groups = ClusterSpec(1, shape.ranks), micro_batch_of_sequence(shape)
        self.ep = ExpertParallel(Layers(shape), cluster, options=options)
        mine = np.arange(dist.get_rank(), shape.ranks * shape.micro_batches, shape.ranks)
        self.traces = [trace.select(mine) for trace in traces]
        self.groups = groups[mine]
        self.tables = [count_loads(trace, groups, shape.micro_batches) for trace in traces]
        self.plans = [self._plan(batch, goal) for batch in range(BATCHES)]
        self.optimizer = torch.optim.SGD(self.ep.model.parameters(), lr=0.0)

    def _plan(self, batch: int, goal: PlanOptions | None) -> BatchPlan:
        if goal is None:
            return static_plan(self.tables[batch], self.ep.cluster)
        micro_batches = self.tables[batch].shape[1]
        return self.ep.plan(self.traces[batch], self.groups, micro_batches, options=goal)

    def max_mean(self) -> float:
        return float(np.mean([p.imbalance_mean(t) for p, t in zip(self.plans, self.tables, strict=True)]))

    def step(self, inputs: list[Tensor], batch: int) -> None:
        self.optimizer.zero_grad()
        with self.ep.batch(self.plans[batch], self.traces[batch], self.groups, self.optimizer):
            for m, x_TH in enumerate(inputs):
                with self.ep.micro_batch(m):
                    out = self.ep.model(x_TH)
                    out.backward(torch.ones_like(out))


class PlainRun:
    """transformers' all-to-all expert parallelism around this rank's experts, on recorded routing."""

    def __init__(self, shape: Shape, trace: RoutingTrace):
        from transformers.distributed.expert_parallel import AllToAllEP

        self.layers = Layers(shape)
        mesh = init_device_mesh("cpu", (shape.ranks, 1), mesh_dim_names=("ep", "tp"))
        per_rank = shape.experts // shape.ranks
        rank = dist.get_rank()
        for moe in self.layers.moe:
            experts = moe.experts
            for name in ("gate_up_proj", "down_proj"):
                whole = getattr(experts, name).detach()
                setattr(experts, name, nn.Parameter(whole[rank * per_rank : (rank + 1) * per_rank].clone()))
            experts.num_experts = per_rank
            exchange = AllToAllEP(experts, mesh["ep"], mesh["tp"])
            experts.dispatcher = _plain_dispatcher(exchange, experts)
        mine = np.arange(rank, shape.ranks * shape.micro_batches, shape.ranks)
        groups, own = micro_batch_of_sequence(shape)[mine], trace.select(mine)
        by_micro_batch = [own.select(np.flatnonzero(groups == m)).expert_ids for m in range(shape.micro_batches)]
        self.indices = [torch.from_numpy(ids.astype(np.int64)) for ids in by_micro_batch]

    def step(self, inputs: list[Tensor], _batch: int) -> None:
        self.layers.zero_grad()
        for x_TH, ids in zip(inputs, self.indices, strict=True):
            for layer, moe in enumerate(self.layers.moe):
                moe.router.recorded = ids[:, layer]
            out = self.layers(x_TH)
            out.backward(torch.ones_like(out))


def _plain_dispatcher(exchange: Any, experts: ReplicatedExperts) -> Callable[..., Tensor]:
    def local(x_TH: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        dispatcher, experts.dispatcher = experts.dispatcher, None
        try:
            return experts(x_TH, index, weights)
        finally:
            experts.dispatcher = dispatcher

    exchange.experts_forward = local
    return lambda _experts, x_TH, index, weights: exchange(x_TH, index, weights)


def rank_main(
    rank: int, store: str, shape: Shape, repeats: int, options: RuntimeOptions, goal: PlanOptions, queue: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=shape.ranks)
    skewed = [skewed_trace(shape, batch) for batch in range(BATCHES)]
    even = [balanced_trace(shape)] * BATCHES
    runs: dict[str, Any] = {
        "static": OurRun(shape, skewed, options, None),
        "planned": OurRun(shape, skewed, options, goal),
        "balanced": OurRun(shape, even, options, None),
        "plain_a2a": PlainRun(shape, even[0]),
    }
    torch.manual_seed(rank)
    inputs = [torch.randn(shape.tokens, shape.hidden, requires_grad=True) for _ in range(shape.micro_batches)]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for repeat in range(repeats + BATCHES):  # one of each batch warms up
        for name in (names[place] for place in ORDERS[repeat // BATCHES % len(ORDERS)]):
            dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            runs[name].step(inputs, repeat % BATCHES)
            took, worked = torch.tensor(time.perf_counter() - start), torch.tensor(time.process_time() - start_cpu)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            dist.all_reduce(worked)
            if repeat >= BATCHES:
                seconds[name].append(float(took))
                cpu_seconds[name].append(float(worked))
    stats = {name: runs[name].ep.stats() for name in ("planned", "balanced")}
    if rank == 0:
        results: dict[str, Any] = {f"{name}_max_mean": runs[name].max_mean() for name in ("static", "planned")}
        plans = runs["planned"].plans
        results["replicas"] = float(np.mean([(plan.replicas >= 0).sum() for plan in plans]))
        results["moved"] = int((plans[0].home != plans[1].home).sum())
        results |= {f"{name}_stats": found.scalars() for name, found in stats.items()}
        for name, values in seconds.items():
            results[f"{name}_s"] = statistics.median(values)
            results[f"{name}_s_quartiles"] = np.quantile(values, [0.25, 0.75]).tolist()
            results[f"{name}_cpu_s"] = statistics.median(cpu_seconds[name])
        results["planned_of_balanced"] = ratio(seconds["balanced"], seconds["planned"])
        results["balanced_over_plain_a2a"] = ratio(seconds["balanced"], seconds["plain_a2a"])
        for name in ("planned", "balanced"):
            results[f"{name}_cpu_over_plain_a2a"] = ratio(cpu_seconds[name], cpu_seconds["plain_a2a"])
        queue.put(results)
    dist.barrier()
    dist.destroy_process_group()


def ratio(over: list[float], under: list[float]) -> float:
    """The median of pairs."""
    return statistics.median(one / other for one, other in zip(over, under, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank and micro-batch")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=16)
    parser.add_argument("--overlap", action="store_true", help="compute own rows while the others travel")
    parser.add_argument("--redispatch", action="store_true", help="fetch received rows again in backward")
    parser.add_argument("--keep-replicas", action="store_true", help="keep replicas from forward to backward")
    parser.add_argument("--balance", type=float, metavar="X", help="max/mean to reach; default: the least time")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    sizes = args.ranks, args.tokens, args.hidden, args.intermediate, args.experts, args.top_k
    shape = Shape(*sizes, args.layers, args.micro_batches)
    options = RuntimeOptions(
        overlap=args.overlap, redispatch=args.redispatch, keep_replicas=args.keep_replicas, on_shift="ignore"
    )  # routing is generated: no router would choose it
    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(
            rank_main,
            (f"{folder}/store", shape, args.repeats, options, PlanOptions(balance=args.balance), queue),
            nprocs=shape.ranks,
            join=False,
        )
        while queue.empty():
            ranks.join(timeout=0.2)
        results = queue.get()
        while not ranks.join():
            pass
    print(f"{shape}, fp32, {args.repeats} interleaved repeats; {results['replicas']:.0f} replicas a batch")
    print(f"{'':10} {'median s':>9} {'quartiles':>15} {'max/mean':>9}")
    for name in ("static", "planned", "balanced", "plain_a2a"):
        low, high = results[f"{name}_s_quartiles"]
        balance = results.get(f"{name}_max_mean", 1.0)
        print(f"{name:10} {results[f'{name}_s']:9.3f} {low:7.3f}-{high:7.3f} {balance:9.3f}")
    print(f"planned throughput / balanced, median of repeats: {results['planned_of_balanced']:.3f}")
    print(f"balanced / plain all-to-all, median of repeats:   {results['balanced_over_plain_a2a']:.3f}")
    cpu = ", ".join(f"{name} {results[f'{name}_cpu_over_plain_a2a']:.3f}" for name in ("planned", "balanced"))
    print(f"CPU seconds / those of plain all-to-all:          {cpu}")
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
