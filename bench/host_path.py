"""Host time of one MoE layer under a plan, on one core and without a GPU: rank 0 of 64, E 128, T 4096, K 8.

    python bench/host_path.py [--tree DIR]

A rank drives `ep.batch` and `ep.micro_batch` over a process group of 64 ranks that is not there: what others would send
follows from rank 0's own, since rank s routes like rank 0, s homes further on. Tensors are on the meta device, where
torch and the launchers do all that a host does for a GPU, and nothing is computed. What torch answers there in slow
Python is answered in a call that only allocates: a launch of CUDA takes as long, some microseconds.

    critical  the launching thread inside the public layer call, forward and backward, without the launchers of the
              kernels that compute experts; those that pack, unpack and add up rows are part of it
    ahead     everything else that the process does to run a micro-batch, in any thread, and in the loop around
    launchers of the experts' kernels in the layer: shapes, configs and allocation; Triton itself is not called
    moving    the part of critical that is launchers of the other kernels

All are CPU milliseconds a layer and micro-batch (measured), less what reading the clock takes: the layers are run one
after another, as in a model, with one backward. Of the micro-batches the median is taken, and for what is ahead the
least. Before anything is timed, a small layer under a plan, on two ranks over gloo, must give the output and gradients
of one process; else it fails. The last line is a JSON object. --tree times another checkout of this project by the same
measure.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

RANKS, PER_NODE, EXPERTS, TOP_K, TOKENS, HIDDEN, HALF = 64, 8, 128, 8, 4096, 2048, 768
LAYERS, MICRO_BATCHES = 16, 8
MOVE_ROWS = ("pack_payload", "unpack_payload", "pack_gradients", "unpack_gradients", "replica_reduce", "pack_replicas")


def main() -> int:
    parser = argparse.ArgumentParser(description="Host time of one MoE layer under a plan.")
    parser.add_argument("--tree", type=Path, help="another checkout, whose code is timed")
    parser.add_argument("--check-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    tree = (args.tree or Path(__file__).parent.parent).resolve()
    if not (tree / "relibra_kernels").is_dir():
        parser.error(f"--tree is {args.tree}; it must be a checkout with a folder relibra_kernels")
    sys.path.insert(0, str(tree))
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.check_rank is not None:
        check_rank(args.check_rank, args.store)
        return 0
    error = check(sys.argv[1:])
    if error:
        print(f"the layer's output or gradients are wrong, so nothing is timed:\n{error}", file=sys.stderr)
        return 1
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = measure()
    print(f"{tree}: {LAYERS} layers, {RANKS} ranks, {EXPERTS} experts, {TOKENS} tokens, top-{TOP_K}")
    print(json.dumps({f"{name}_ms": round(1e3 * seconds, 4) for name, seconds in found.items()}))
    return 0


def check(arguments: list[str]) -> str:
    """What is wrong with the layer at a small size, on two ranks; empty where nothing is."""
    import subprocess

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *arguments, "--store", f"{folder}/store", "--check-rank"]
        ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
        errors = [process.communicate(timeout=300)[1] for process in ranks]
        return "\n".join(text for process, text in zip(ranks, errors, strict=True) if process.returncode)


def check_rank(rank: int, store: str) -> None:
    """One of two ranks, with replicas and in float64: raises where it differs from one process."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from relibra_kernels.nn import ReplicatedExperts, ReplicatedMoE, TopKRouter, replay_routing
    from relibra_kernels.parallel import ExpertParallel
    from relibra_kernels.planner import ClusterSpec, RoutingTrace, plan_batch

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    experts, top_k, hidden, tokens = 8, 2, 16, 40

    def make() -> ReplicatedMoE:
        torch.manual_seed(1)
        layer = ReplicatedMoE(TopKRouter(hidden, experts, top_k), ReplicatedExperts(experts, hidden, 24))
        layer.experts.reset_parameters(std=0.3)
        return layer.double()

    random = np.random.default_rng(0)
    weights = random.lognormal(0, 1.5, experts)
    ids = np.stack([random.choice(experts, top_k, False, weights / weights.sum()) for _ in range(2 * tokens)])
    x_all = torch.randn(2 * tokens, hidden, dtype=torch.float64)
    mine = slice(rank * tokens, (rank + 1) * tokens)

    alone, x = make(), x_all.clone().requires_grad_()
    with replay_routing([alone.router], torch.from_numpy(ids)[:, None]):
        expected = alone(x)
    expected.sin().sum().backward()

    layer, x_mine = make(), x_all[mine].clone().requires_grad_()
    ep = ExpertParallel(layer, ClusterSpec(1, 2))
    trace = RoutingTrace(ids[mine, None].astype(np.int8), np.array([0, tokens]), experts, (0,))
    group = np.zeros(1, np.int64)
    plan = plan_batch(ep.gather_loads(trace, group, 1), ep.cluster)
    with ep.batch(plan, trace, group, None), ep.micro_batch(0):
        out = layer(x_mine)
        out.sin().sum().backward()
    torch.testing.assert_close(out, expected[mine], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x_mine.grad, x.grad[mine], rtol=1e-12, atol=1e-12)
    gathered = dict(ep.named_logical_parameters(lambda parameter: parameter.grad))
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        torch.testing.assert_close(gathered[name], alone.get_parameter(name).grad, rtol=1e-11, atol=1e-12)
    dist.destroy_process_group()


def measure() -> dict[str, float]:
    """Seconds a layer and micro-batch by part."""
    import numpy as np
    import torch

    from relibra_kernels.configs.limits import device_named
    from relibra_kernels.kernels.launch import recording
    from relibra_kernels.nn import ReplicatedExperts, ReplicatedMoE, TopKRouter
    from relibra_kernels.parallel import ExpertParallel, RuntimeOptions
    from relibra_kernels.planner import ClusterSpec, RoutingTrace, static_plan

    torch.set_num_threads(1)
    how = {"dtype": torch.bfloat16, "device": "meta"}
    layers = torch.nn.ModuleList(
        ReplicatedMoE(TopKRouter(HIDDEN, EXPERTS, TOP_K, **how), ReplicatedExperts(EXPERTS, HIDDEN, HALF, **how))
        for _ in range(LAYERS)
    )
    ids = recorded_ids()
    groups = np.arange(MICRO_BATCHES)
    trace = RoutingTrace(
        np.concatenate([ids] * MICRO_BATCHES), TOKENS * np.arange(MICRO_BATCHES + 1), EXPERTS, tuple(range(LAYERS))
    )
    known = RuntimeOptions.__dataclass_fields__
    wanted = {"compare_dense": False, "on_shift": "ignore", "transport": "one"}
    options = RuntimeOptions(**{name: value for name, value in wanted.items() if name in known})
    launchers = Clock()
    found: dict[str, list[float]] = {name: [] for name in ("critical", "ahead", "launchers", "moving")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(nobody_else(ids))
        stack.enter_context(recording(device_named("sm_90"), lambda _: None))
        stack.enter_context(launchers.around_ops())
        stack.enter_context(quick_answers())
        cluster = ClusterSpec(RANKS // PER_NODE, PER_NODE)
        ep = ExpertParallel(layers, cluster, options=options)
        plan = static_plan(ep.gather_loads(trace, groups, MICRO_BATCHES), cluster)
        with contextlib.suppress(DoneError), ep.batch(plan, trace, groups, None):
            for m in range(MICRO_BATCHES):
                x_TH = torch.empty(TOKENS, HIDDEN, **how, requires_grad=True)
                grad_TH = torch.empty(TOKENS, HIDDEN, **how)
                everything = time.process_time()
                calls = []
                with ep.micro_batch(m):
                    for layer in layers:
                        x_TH, *seconds = launchers.split(partial(layer, x_TH))
                        calls.append(seconds)
                    calls.append(launchers.split(partial(x_TH.backward, grad_TH))[1:])
                everything = time.process_time() - everything
                outside, experts, moving = (sum(parts) / LAYERS for parts in zip(*calls, strict=True))
                found["critical"].append(outside + moving)
                found["launchers"].append(experts)
                found["moving"].append(moving)
                found["ahead"].append(everything / LAYERS - outside - experts - moving)
            raise DoneError
    ahead = found.pop("ahead")[2:-1]  # the first ones warm up; nothing is made ahead in the last one
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()} | {"ahead": min(ahead)}


class DoneError(Exception):
    """The batch is not closed: what closes it reads the device."""


class Clock:
    """CPU seconds of this thread in what is wrapped, without those that reading the clock takes.

    Attributes:
        seconds: in launchers of the experts' kernels, and in others. calls: of each.
    """

    def __init__(self) -> None:
        self.seconds, self.calls, self._inside = [0.0, 0.0], [0, 0], False
        empty = self._timed("", lambda: None)
        each = [self._once(empty) for _ in range(1000)]
        self.unseen = statistics.median(out - inside for out, inside in each)  # of a wrapped call, seen from outside
        self.seen = statistics.median(inside for _, inside in each)  # by itself

    def split(self, call: Callable[[], Any]) -> tuple[Any, float, float, float]:
        """(what it returns, its seconds outside of what is wrapped, in the experts' launchers, in others)."""
        seconds, calls, start = list(self.seconds), list(self.calls), time.thread_time()
        result = call()
        total = time.thread_time() - start
        inside = [after - before for after, before in zip(self.seconds, seconds, strict=True)]
        count = [after - before for after, before in zip(self.calls, calls, strict=True)]
        experts, others = (took - times * self.seen for took, times in zip(inside, count, strict=True))
        return result, total - sum(inside) - sum(count) * self.unseen, experts, others

    def _once(self, call: Callable[[], Any]) -> tuple[float, float]:
        before, start = sum(self.seconds), time.thread_time()
        call()
        return time.thread_time() - start, sum(self.seconds) - before

    @contextlib.contextmanager
    def around_ops(self) -> Iterator[None]:
        """Within, every function of `relibra_kernels.ops` that launches kernels."""
        from relibra_kernels import ops

        names = [name for name in vars(ops) if hasattr(getattr(ops, name), "__wrapped__") and name != "backend"]
        before = {name: getattr(ops, name) for name in names}
        for name, function in before.items():
            setattr(ops, name, self._timed(name, function))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(ops, name, function)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        moves = name in MOVE_ROWS or name.startswith("build_schedule")

        def call(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return function(*arguments, **options)
            self._inside, start = True, time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                # received rows are summed with their gate weights; what came back of them is added up without
                kind = moves or (name == "unpermute" and sys._getframe(1).f_code.co_filename.endswith("hop.py"))
                self.seconds[kind] += time.thread_time() - start
                self.calls[kind] += 1
                self._inside = False

        return call


def recorded_ids() -> Any:
    """int16 [T, L, K]: random routing with skewed experts."""
    import numpy as np

    random = np.random.default_rng(0)
    score = np.log(random.lognormal(0, 1, (1, LAYERS, EXPERTS))) + random.gumbel(size=(TOKENS, LAYERS, EXPERTS))
    return np.argsort(-score, axis=2)[:, :, :TOP_K].astype(np.int16)


@contextlib.contextmanager
def quick_answers() -> Iterator[None]:
    """Operators whose answer on the meta device torch works out in Python, for up to a millisecond."""
    import torch

    def new(shape: Any, dtype: Any) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    def both(one: Any, other: Any, **_: Any) -> Any:
        shape = one.shape
        if torch.is_tensor(other) and other.shape != shape:
            pairs = itertools.zip_longest(reversed(shape), reversed(other.shape), fillvalue=1)
            shape = [max(pair) for pair in pairs][::-1]
        return new(shape, torch.result_type(one, other))

    def like(tensor: Any, *_: Any, **__: Any) -> Any:
        return new(tensor.shape, tensor.dtype)

    def total(tensor: Any, dims: Any, keepdim: bool = False, *, dtype: Any = None) -> Any:
        gone = {dim % tensor.ndim for dim in dims}
        shape = [1 if dim in gone else size for dim, size in enumerate(tensor.shape) if keepdim or dim not in gone]
        return new(shape, dtype or tensor.dtype)

    answers = {
        **dict.fromkeys(("div.Tensor", "div.Tensor_mode", "mul.Tensor", "add.Tensor"), both),
        **dict.fromkeys(("neg", "scatter_add"), like),
        "new_empty": lambda tensor, size, *, dtype=None, **_: new(size, dtype or tensor.dtype),
        "mm": lambda one, other: new((one.shape[0], other.shape[1]), one.dtype),
        "zeros_like": lambda tensor, *, dtype=None, **_: new(tensor.shape, dtype or tensor.dtype),
        "add_.Tensor": lambda tensor, *_, **__: tensor,
        "sum.dim_IntList": total,
        "gather": lambda tensor, _, index, **__: new(index.shape, tensor.dtype),
        "index_select.out": lambda *_, out: out,
        "_softmax": lambda tensor, _, widen: new(tensor.shape, torch.float32 if widen else tensor.dtype),
        "_softmax_backward_data": lambda grad, _, __, dtype: new(grad.shape, dtype),
    }
    library = torch.library.Library("aten", "IMPL")
    for name, answer in answers.items():
        library.impl(name, answer, "Meta", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def nobody_else(ids_TLK: Any) -> Iterator[None]:
    """A process group of 64 ranks of which this is the first, and the only one.

    Whatever goes to the device stays readable on the host, for code that reads it back.
    """
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from relibra_kernels.parallel.comm.collectives import Comm

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    work = SimpleNamespace(wait=lambda *_: True, is_completed=lambda: True)
    step = EXPERTS // RANKS

    def gather(_: Any, array: Any, *__: Any) -> Any:
        if array.ndim == 3:  # loads [L, M, E]
            return np.stack([np.roll(array, rank * step, 2) for rank in range(RANKS)])
        return np.stack([array] * RANKS)

    def exchange(received: Any, send: Any, receive_counts: Any, send_counts: Any, **_: Any) -> Any:
        there = getattr(send, "on_host", send)
        if there.device.type == "cpu" and len(send_counts) == RANKS:
            parts = there.split(list(send_counts))
            got = torch.cat([parts[-source % RANKS] for source in range(RANKS)])
            if received.device.type == "cpu":
                received.copy_(got)
            else:
                received.on_host = got
        return work

    to, numpy = torch.Tensor.to, torch.Tensor.numpy

    def to_device(tensor: Any, *arguments: Any, **options: Any) -> Any:
        moved = to(tensor, *arguments, **options)
        if moved.device.type == "meta" and tensor.device.type == "cpu":
            moved.on_host = tensor
        return moved

    def to_numpy(tensor: Any, *, force: bool = False) -> Any:
        return numpy(getattr(tensor, "on_host", tensor), force=force)

    counts = counts_of(ids_TLK)
    patches = [
        (dist, "new_group", lambda *_, **__: dist.group.WORLD),
        (dist, "get_backend", lambda *_: "gloo"),
        (dist, "all_to_all_single", exchange),
        (Comm, "gather_arrays", gather),
        (torch.Tensor, "to", to_device),
        (torch.Tensor, "numpy", to_numpy),
    ]
    ahead = sys.modules.get("relibra_kernels.parallel.ahead")
    if ahead is not None:
        patches.append((ahead, "download_later", lambda on_device: lambda: counts(on_device.shape)))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, new in patches:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, old in before:
            setattr(owner, name, old)
        dist.destroy_process_group()


def counts_of(ids_TLK: Any) -> Callable[[Any], Any]:
    """What a rank counts of its own routing, as the device would, by the shape that is asked for."""
    import numpy as np

    owner = ids_TLK.transpose(1, 0, 2) // (EXPERTS // RANKS)  # [L, T, K]
    to_ranks = np.stack([(owner == rank).sum(2) for rank in range(RANKS)], 1)  # [L, R, T]
    by_rank = np.stack([(to_ranks > 0).sum(2), to_ranks.max(2), to_ranks.sum(2)], 2).astype(np.int32)

    def counts(shape: Any) -> Any:
        if shape == (LAYERS, RANKS, 3):
            return by_rank
        return by_rank.reshape(LAYERS, -1)

    return counts


if __name__ == "__main__":
    sys.exit(main())
