"""What batches report, run on every rank of a group."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import profile
from toy_training import Case, ToyModel, loss_sum, make_batch, make_plan, model_input, not_last, start, train_steps

from relibra_kernels.nn import replay_routing
from relibra_kernels.parallel import BatchStats, ExpertParallel, RoutedBatch, RuntimeOptions
from relibra_kernels.parallel.tokens import layer
from relibra_kernels.planner import BatchPlan, ClusterSpec, PlanOptions


def stats_of_batch(case: Case) -> tuple[BatchStats, str, list[str], list[int]]:
    """The statistics of one batch and their line, the profiler's ranges, and the assignments that the experts
    of this rank were given in every (micro-batch, layer)."""
    ep, optimizer = start(case)
    computed: list[int] = []
    original = layer.moe_mlp_forward

    def counting(x, weights, schedule, *rest, **options):
        computed.append(int(schedule.slot_offsets[-1]))
        return original(x, weights, schedule, *rest, **options)

    layer.moe_mlp_forward = counting
    try:
        with profile() as profiler:
            train_steps(case, ep, optimizer, range(1))
    finally:
        layer.moe_mlp_forward = original
    stats = ep.stats()
    return stats, ep.stats_line(), [event.key for event in profiler.key_averages()], computed


def planned_elsewhere(case: Case, executor: str) -> tuple[BatchPlan, BatchPlan]:
    """A plan made in a thread or a spawned process, while this one counts again, and the plan made here."""
    ep, _ = start(case)
    trace, groups, _ = make_batch(case, 0)
    mine = np.arange(dist.get_rank(), trace.num_sequences, case.ranks)
    arguments = trace.select(mine), groups[mine], case.micro_batches
    options = PlanOptions(balance=1.0)
    spawn = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))
    with {"thread": ThreadPoolExecutor, "process": spawn}[executor](1) as elsewhere:
        later = ep.plan_later(*arguments, elsewhere, options=options)
        here = ep.plan(*arguments, options=options)
        return later.result(), here


def differing_routes(case: Case, count: int, spare: int) -> tuple[dict[str, np.ndarray], int, dict[str, np.ndarray]]:
    """One micro-batch in which `count` tokens a rank choose others in layer 0: (gradients, how many were counted,
    gradients of one process that replays what was chosen)."""
    rank = dist.get_rank()
    cluster = ClusterSpec(1, case.ranks, case.replica_slots)
    ep = ExpertParallel(ToyModel(case), cluster, options=RuntimeOptions(spare_rows=spare))
    trace, groups, tokens = make_batch(case, 0)
    mine = np.arange(rank, trace.num_sequences, case.ranks)
    my_trace, my_groups = trace.select(mine), groups[mine]
    plan = make_plan(case, ep, RoutedBatch(my_trace, my_groups, case.micro_batches), 0)
    recorded = ep.layers[0].router.replay

    def chosen(ids_TK: torch.Tensor) -> torch.Tensor:
        return torch.cat([(ids_TK[:count] + 1) % case.experts, ids_TK[count:]])

    ep.layers[0].router.replay = lambda: (chosen(recorded()[0]), False)
    ids, rows, counted = model_input(case, my_trace, tokens, mine, np.flatnonzero(my_groups == 0))
    with ep.batch(plan, my_trace, my_groups, None), ep.micro_batch(0, rows):
        loss_sum(ep.model(ids), ids, counted).backward()
    ep.reduce_gradients()
    named = ep.named_logical_parameters(lambda p: p.grad)
    gradients = {name: grad.numpy().copy() for name, grad in named if grad is not None}

    model = ToyModel(case)
    for other in range(case.ranks):
        sequences = np.arange(other, trace.num_sequences, case.ranks)
        part = trace.select(sequences[groups[sequences] == 0])
        replayed = torch.from_numpy(part.expert_ids).long()
        replayed[:, 0] = chosen(replayed[:, 0])
        ids = torch.from_numpy(np.concatenate([tokens[i] for i in sequences[groups[sequences] == 0]]))
        with replay_routing([moe.router for moe in model.moe], replayed):
            loss_sum(model(ids), ids, not_last(part)).backward()
    alone = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, ep.stats().differing_tokens, alone
