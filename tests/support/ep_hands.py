"""What users do with a model beside training it in a batch, on every rank of a group of two."""

import copy
import gc
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from toy_training import Case, ToyModel, loss_sum, make_batch, make_plan, start
from training_checks import worst_error

from relibra_kernels.parallel import ExpertParallel, RoutedBatch, RuntimeOptions
from relibra_kernels.planner import ClusterSpec, ReLibraError

CASE = Case(layers=2, sequence_lengths=(7,) * 8)


def inputs_of(case: Case = CASE) -> tuple[RoutedBatch, list[torch.Tensor], list[torch.Tensor]]:
    """This rank's routed batch, and the token ids of every micro-batch: of this rank, and of all ranks."""
    trace, groups, tokens = make_batch(case, 0)
    mine = np.arange(dist.get_rank(), trace.num_sequences, case.ranks)

    def ids(sequences: np.ndarray, m: int) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([tokens[i] for i in sequences if groups[i] == m]))

    batch = RoutedBatch(trace.select(mine), groups[mine], case.micro_batches)
    everyone = np.arange(trace.num_sequences)
    own, whole = ([ids(which, m) for m in range(case.micro_batches)] for which in (mine, everyone))
    return batch, own, whole


def run_batch(ep: ExpertParallel, model: torch.nn.Module, batch: RoutedBatch, inputs: list[torch.Tensor], plan=None):
    """Forward and backward of every micro-batch under a plan that moves and copies experts."""
    with ep.batch(plan or make_plan(replace(CASE, plan="shuffled"), ep, batch, 0), batch, None):
        for m, ids in enumerate(inputs):
            with ep.micro_batch(m):
                loss(model, ids).backward()


def loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return loss_sum(model(ids), ids, torch.ones(len(ids), dtype=torch.bool))


def gradients_of(ep: ExpertParallel) -> dict[str, np.ndarray]:
    """Of the whole model, summed over the ranks."""
    ep.reduce_gradients()
    named = ep.named_logical_parameters(lambda p: p.grad)
    return {name: grad.numpy().copy() for name, grad in named if grad is not None}


def alone_live(whole: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Gradients of one process that routes live."""
    model = ToyModel(CASE)
    for ids in whole:
        loss(model, ids).backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


def live_training(case: Case) -> float:
    """How far gradients without a batch are from one process's, after experts have moved."""
    batch, own, whole = inputs_of(case)
    ep, _ = start(case)
    run_batch(ep, ep.model, batch, own)
    ep.model.zero_grad()
    assert (ep.home[0] != np.arange(case.experts) // (case.experts // case.ranks)).any()
    for ids in own:
        loss(ep.model, ids).backward()
    return worst_error(gradients_of(ep), alone_live(whole))


def record_then_train(case: Case) -> tuple[bool, float, int]:
    """(the record is what the model chose, how far gradients under its plan are from live ones, replicas used)."""
    _, own, whole = inputs_of(case)
    ep, _ = start(case)
    with ep.record() as record, torch.no_grad():
        for ids in own:
            ep.model(ids)
    batch = record.routed_batch()
    chosen, model = [], ToyModel(CASE)
    for ids in own:
        x_TH, layers = model.embedding(ids), []
        for moe in model.moe:
            layers.append(moe.router(x_TH)[2])
            x_TH = model._block(moe, x_TH)
        chosen.append(torch.stack(layers, 1))
    same = np.array_equal(batch.trace.expert_ids, torch.cat(chosen).numpy())
    plan = make_plan(replace(CASE, plan="shuffled"), ep, batch, 0)
    run_batch(ep, ep.model, batch, own, plan)
    return same, worst_error(gradients_of(ep), alone_live(whole)), int((plan.replicas >= 0).sum())


def copied(case: Case) -> float:
    """How far a copy's logits are from the model's own, once the original's experts have moved."""
    batch, own, _ = inputs_of(case)
    ep, _ = start(case)
    before = ToyModel(case)(own[0])
    reference = copy.deepcopy(ep.model).requires_grad_(False)
    with ep.batch(make_plan(replace(case, plan="shuffled"), ep, batch, 0), batch, None):
        for m, ids in enumerate(own):
            with ep.micro_batch(m):
                within = reference(own[0])
                loss(ep.model, ids).backward()
    after = reference(own[0])
    return max(float((got - before).abs().max()) for got in (within, after))


def state_dicts() -> tuple[bool, str]:
    """(a state dict loads where it came from, the refusal where experts are elsewhere)."""
    batch, own, _ = inputs_of()
    ep, _ = start(CASE)
    fresh, _ = start(CASE)
    fresh.model.load_state_dict(copy.deepcopy(ep.model.state_dict()))
    run_batch(ep, ep.model, batch, own)
    saved = copy.deepcopy(ep.model.state_dict())
    ep.model.load_state_dict(saved)
    try:
        fresh.model.load_state_dict(saved)
    except ReLibraError as error:
        return True, str(error)
    return True, ""


def other_dtypes() -> list[float]:
    """How far fp32 experts are from fp64 ones when they are fed bf16: directly, and under autocast."""
    batch, own, _ = inputs_of()
    case = replace(CASE, dtype=torch.float32)
    errors = []
    for autocast in (False, True):
        ep, _ = start(case)
        moe = ep.layers[0]
        x_TH = torch.randn(len(own[0]), CASE.hidden, generator=torch.Generator().manual_seed(dist.get_rank()))
        rounded = x_TH.bfloat16()
        plan = make_plan(replace(case, plan="shuffled"), ep, batch, 0)
        with ep.batch(plan, batch, None), ep.micro_batch(0), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            index, _ = moe.router.replay()
            index = index.clamp(min=0)
            gates = torch.full(index.shape, 0.5)
            got = moe.experts(rounded, torch.where(moe.router.replay()[0] < 0, -1, index), gates)
            got.float().square().sum().backward()
        whole = ToyModel(case).moe[0].experts
        expected = whole(rounded.float(), torch.where(torch.from_numpy(first_rows(batch)) < 0, -1, index), gates)
        assert got.dtype == torch.bfloat16
        errors.append(float((got.float() - expected).norm() / expected.norm()))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.experts.parameters())
    return errors


def first_rows(batch: RoutedBatch) -> np.ndarray:
    """int64 [T, K]: recorded ids of the first layer and micro-batch."""
    return batch.trace.select(batch.sequences(0)).expert_ids[:, 0].astype(np.int64)


def compiled(case: Case) -> float:
    """How far gradients of one graph, compiled, are from those of the model as it is."""
    batch, own, _ = inputs_of(case)
    found = []
    for compile_it in (False, True):
        ep, _ = start(case)
        model = torch.compile(ep.model, backend="aot_eager", fullgraph=True) if compile_it else ep.model
        run_batch(ep, model, batch, own)
        found.append(gradients_of(ep))
        torch._dynamo.reset()
    return worst_error(found[1], found[0])


def two_models() -> float:
    """How far gradients of two checkpointed models in one nested micro-batch are from those of one by one."""
    batch, own, _ = inputs_of()
    found = []
    for nested in (False, True):
        case = replace(CASE, checkpoint="non-reentrant" if nested else "")
        runs = [start(replace(case, seed=seed))[0] for seed in (0, 1)]
        with ExitStack() as stack:
            for ep in runs:
                stack.enter_context(ep.batch(make_plan(replace(CASE, plan="shuffled"), ep, batch, 0), batch, None))
            for m, ids in enumerate(own):
                if nested:
                    with runs[0].micro_batch(m), runs[1].micro_batch(m):
                        sum(loss(ep.model, ids) for ep in runs).backward()
                else:
                    for ep in runs:
                        with ep.micro_batch(m):
                            loss(ep.model, ids).backward()
        found.append([gradients_of(ep) for ep in runs])
    return max(worst_error(a, b) for a, b in zip(found[1], found[0], strict=True))


def one_rank_stops(where: str) -> tuple[str, float]:
    """(the error of this rank where the last one fails, seconds until it came)."""
    batch, own, _ = inputs_of()
    ep, _ = start(CASE)
    plan, begin = ep.plan(batch), time.monotonic()
    try:
        with ep.batch(plan, batch, None):
            for m, ids in enumerate(own):
                begin = time.monotonic()
                rows = np.arange(len(ids))
                last = dist.get_rank() == CASE.ranks - 1 and m == 1
                if last and where == "rows":
                    rows[0] = rows[1]
                with ep.micro_batch(m, rows):
                    if last and where == "between":
                        raise ValueError("the reward model is gone")
                    loss(ep.model, ids).backward()
    except (ReLibraError, ValueError) as error:
        return str(error), time.monotonic() - begin
    return "", 0.0


def summed_in(dtype: torch.dtype | None) -> float:
    """How far bf16 gradients over 32 micro-batches are from fp32 ones of the same weights."""
    case = replace(CASE, micro_batches=32, sequence_lengths=(9,) * 128, layers=1)
    trace, groups, tokens = make_batch(case, 0)
    mine = np.arange(dist.get_rank(), trace.num_sequences, case.ranks)
    batch, found = RoutedBatch(trace.select(mine), groups[mine], 32), []
    for of_weights in (torch.float32, torch.bfloat16):
        model = ToyModel(case).to(torch.bfloat16).to(of_weights)
        cluster = ClusterSpec(1, case.ranks, case.replica_slots)
        ep = ExpertParallel(model, cluster, options=RuntimeOptions(gradient_dtype=dtype))
        experts = model.moe[0].experts
        with ep.batch(make_plan(replace(case, plan="shuffled"), ep, batch, 0), batch, None):
            for m in range(32):
                ids = np.concatenate([tokens[mine[i]] for i in batch.sequences(m)])
                with ep.micro_batch(m):
                    index = ep.layers[0].router.replay()[0]
                    x_TH = torch.nn.functional.one_hot(torch.from_numpy(ids) % case.hidden, case.hidden).to(of_weights)
                    gates = torch.full(index.shape, 0.5, dtype=of_weights)
                    out = experts(x_TH, index, gates)
                    (out.float() * torch.arange(case.hidden)).sum().backward()
        found.append(experts.down_proj.grad.double())
    return float((found[1] - found[0]).norm() / found[0].norm())


def made_again_and_again(closing: bool) -> list[tuple[int, int]]:
    """(threads, open files) after each of several runs, once they are what they were after the run before, or 2 s."""
    counts: list[tuple[int, int]] = []
    for _ in range(5):
        ep, _ = start(CASE)
        if closing:
            ep.close()
        del ep
        gc.collect()
        dist.barrier()
        for _ in range(40):
            time.sleep(0.05)
            now = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
            if now in counts[-1:]:
                break
        counts.append(now)
        dist.barrier()
    return counts


def after_closing() -> str:
    """The refusal of a model whose runtime was closed."""
    _, own, _ = inputs_of()
    ep, _ = start(CASE)
    ep.close()
    try:
        ep.model(own[0])
    except ReLibraError as error:
        return str(error)
    return ""


def forwards_after_pauses() -> float:
    """Seconds that the first rank waited for the second, which pauses longer, and longer than is waited without one."""
    options = RuntimeOptions(live_wait_seconds=1.5)
    ep = ExpertParallel(ToyModel(CASE), ClusterSpec(1, 2), options=options)
    ids = torch.arange(8)
    with torch.no_grad():
        ep.model(ids)
        time.sleep(4.5 if dist.get_rank() else 1.2)
        begin = time.monotonic()
        ep.model(ids)
    return time.monotonic() - begin


def one_forward_more() -> tuple[str, float, int]:
    """(the error of the rank that runs one forward more than the other, its seconds, forwards that ran)."""
    options = RuntimeOptions(live_wait_seconds=3.0)
    ep, ran = ExpertParallel(ToyModel(CASE), ClusterSpec(1, 2), options=options), 0
    ids = torch.arange(8)
    begin = time.monotonic()
    try:
        for _ in range(2 if dist.get_rank() else 3):
            begin = time.monotonic()
            with torch.no_grad():
                ep.model(ids)
            ran += 1
    except ReLibraError as error:
        return str(error), time.monotonic() - begin, ran
    time.sleep(6)  # it does something else
    return "", time.monotonic() - begin, ran
