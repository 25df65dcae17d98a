"""The demo's ranks: one process each, which train on the rollouts under three policies and check the results."""

import statistics
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from ...nn import replay_routing
from ...parallel import ExpertParallel
from ...planner import BatchPlan, ClusterSpec, RoutingTrace, count_loads, plan_batch, static_plan
from .grpo import answer_tokens, make_inputs, sequence_losses
from .rollout import Rollouts
from .toy import build_model, moe_layers

RANKS = 2
CLUSTER = ClusterSpec(num_nodes=1, gpus_per_node=RANKS, replica_slots=2)
MICRO_BATCHES = 4
LEARNING_RATE = 1e-4
MODEL_NAME = "demo-qwen3-moe"


@dataclass(frozen=True)
class Policy:
    """How one of the compared runs routes and places: for each batch, the trace that is replayed and its plan."""

    traces: list[RoutingTrace]
    plans: list[BatchPlan]


def micro_batch_of_sequence(rollouts: Rollouts) -> np.ndarray:
    """Consecutive sequences, so that micro-batches differ in length."""
    return np.arange(len(rollouts.tokens)) * MICRO_BATCHES // len(rollouts.tokens)


def make_policies(batches: list[Rollouts]) -> dict[str, Policy]:
    """Static placement, our plans, and routing that is balanced by force, for the same batches."""
    recorded = [rollouts.trace for rollouts in batches]
    loads = [count_loads(r.trace, micro_batch_of_sequence(r), MICRO_BATCHES) for r in batches]
    planned: list[BatchPlan] = []
    for table in loads:
        previous = planned[-1].home if planned else None
        planned.append(plan_batch(table, CLUSTER, previous_home=previous, model=MODEL_NAME))
    balanced = [_balanced_trace(trace) for trace in recorded]
    balanced_loads = [
        count_loads(trace, micro_batch_of_sequence(r), MICRO_BATCHES)
        for trace, r in zip(balanced, batches, strict=True)
    ]
    return {
        "static": Policy(recorded, [static_plan(table, CLUSTER, MODEL_NAME) for table in loads]),
        "planned": Policy(recorded, planned),
        "balanced": Policy(balanced, [static_plan(table, CLUSTER, MODEL_NAME) for table in balanced_loads]),
    }


def _balanced_trace(trace: RoutingTrace) -> RoutingTrace:
    """The same tokens, dealt out to all experts in turn; a token's experts lie apart, so that it visits both ranks."""
    apart = np.arange(trace.top_k) * (trace.num_experts // trace.top_k)
    turn = (np.arange(trace.num_tokens)[:, None] + apart) % trace.num_experts
    dealt = np.broadcast_to(turn[:, None], trace.expert_ids.shape)
    ids = np.where(trace.expert_ids >= 0, dealt, -1).astype(trace.expert_ids.dtype)
    return RoutingTrace(ids, trace.offsets, trace.num_experts, trace.moe_layer_ids)


@dataclass(frozen=True)
class Reference:
    """What one process gives: each sequence's loss and every gradient of the first batch, parameters after the last."""

    losses: Tensor
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def train_alone(state: dict[str, Tensor], batches: list[Rollouts]) -> Reference:
    """One optimizer step a batch in this process, with the recorded routing replayed."""
    model = build_model(0)
    model.load_state_dict(state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    routers = [moe.router for moe in moe_layers(model)]
    losses, gradients = [], {}
    for index, rollouts in enumerate(batches):
        optimizer.zero_grad()
        for m in range(MICRO_BATCHES):
            sequences = np.flatnonzero(micro_batch_of_sequence(rollouts) == m)
            inputs = make_inputs(rollouts, sequences)
            ids = rollouts.trace.select(sequences).expert_ids
            padding = np.full((1, *ids.shape[1:]), -1, ids.dtype)
            with replay_routing(routers, torch.from_numpy(np.concatenate([ids, padding])[inputs.rows])):
                loss = sequence_losses(model, inputs)
                (loss.sum() / answer_tokens(rollouts)).backward()
            if index == 0:
                losses.append(loss.detach())
        if index == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Reference(torch.cat(losses), gradients, parameters)


class Run:
    """One policy on one rank: its own model, experts and optimizer."""

    def __init__(self, policy: Policy, state: dict[str, Tensor], batches: list[Rollouts]):
        self.policy, self.batches = policy, batches
        self.model: nn.Module = build_model(0)
        self.model.load_state_dict(state)
        self.ep = ExpertParallel(self.model, CLUSTER, model_name=MODEL_NAME)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def forward_backward(self, index: int) -> Tensor:
        """Gradients of one batch; returns the losses of this rank's sequences."""
        rollouts, trace, plan = self.batches[index], self.policy.traces[index], self.policy.plans[index]
        mine = np.arange(self.ep.comm.rank, len(rollouts.tokens), RANKS)
        groups = micro_batch_of_sequence(rollouts)[mine]
        self.optimizer.zero_grad()
        losses = []
        with self.ep.batch(plan, trace.select(mine), groups, self.optimizer):
            for m in range(MICRO_BATCHES):
                inputs = make_inputs(rollouts, mine[groups == m])
                with self.ep.micro_batch(m, inputs.rows):
                    loss = sequence_losses(self.model, inputs)
                    (loss.sum() / answer_tokens(rollouts)).backward()
                losses.append(loss.detach())
        self.ep.reduce_gradients()
        return torch.cat(losses)

    def timed_step(self, index: int) -> float:
        """Seconds of a whole optimizer step, migration and tables included: the slowest rank's."""
        dist.barrier()
        start = time.perf_counter()
        self.forward_backward(index)
        self.optimizer.step()
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return float(seconds)


def check_parity(run: Run, reference: Reference) -> dict[str, float]:
    """Largest norm-wise relative errors of the planned run against one process, over a step, a migration and a step."""
    mine = run.forward_backward(0)
    everyone = torch.zeros_like(reference.losses)
    everyone[run.ep.comm.rank :: RANKS] = mine
    dist.all_reduce(everyone)
    gradients = dict(run.ep.named_logical_parameters(lambda parameter: parameter.grad))
    run.optimizer.step()
    run.forward_backward(1)
    run.optimizer.step()
    parameters = dict(run.ep.named_logical_parameters())
    return {
        "parity_loss": _relative_error(everyone, reference.losses),
        "parity_grad": max(_relative_error(gradients[name], g) for name, g in reference.gradients.items()),
        "parity_parameters": max(_relative_error(parameters[name], p) for name, p in reference.parameters.items()),
    }


def _relative_error(got: Tensor | None, expected: Tensor) -> float:
    assert got is not None
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def run_ranks(
    state: dict[str, Tensor],
    batches: list[Rollouts],
    policies: dict[str, Policy],
    reference: Reference,
    repeats: int,
) -> Generator[None, None, dict[str, Any]]:
    """Start the ranks and return rank 0's results; yields for every optimizer step done."""
    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "store"), queue, state, batches, policies, reference, repeats)
        ranks = mp.start_processes(_rank_main, arguments, nprocs=RANKS, join=False, start_method="spawn")
        results: dict[str, Any] | None = None
        while results is None:
            while queue.empty():
                ranks.join(timeout=0.05)  # raises where a rank failed
            results = queue.get()
            if results is None:
                yield
        while not ranks.join():
            pass
    return results


def steps_to_run(repeats: int) -> int:
    """How many optimizer steps `run_ranks` reports."""
    return 2 + 3 * (repeats + 1)


def _rank_main(
    rank: int,
    store: str,
    queue: Any,
    state: dict[str, Tensor],
    batches: list[Rollouts],
    policies: dict[str, Policy],
    reference: Reference,
    repeats: int,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)

    def report(message: dict[str, Any] | None) -> None:
        if rank == 0:
            queue.put(message)

    results: dict[str, Any] = check_parity(Run(policies["planned"], state, batches), reference)
    report(None)
    report(None)
    runs = {name: Run(policy, state, batches) for name, policy in policies.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):  # interleaved, so that a slow moment of the machine hits all alike
        for name, run in runs.items():
            took = run.timed_step(repeat % len(batches))
            if repeat:  # the first one warms up
                seconds[name].append(took)
            report(None)
    for name, run in runs.items():
        results[f"{name}_s"] = statistics.median(seconds[name])
        results[f"{name}_s_quartiles"] = np.quantile(seconds[name], [0.25, 0.75]).tolist()
        sent = torch.tensor([float(sum(run.ep.comm.bytes_sent.values()))])
        replica = torch.tensor([float(sum(n for (kind, _), n in run.ep.comm.bytes_sent.items() if "replica" in kind))])
        moved = torch.tensor([float(sum(n for (kind, _), n in run.ep.comm.bytes_sent.items() if kind == "migration"))])
        for key, value in (("bytes", sent), ("replica_bytes", replica), ("migration_bytes", moved)):
            dist.all_reduce(value)
            results[f"{name}_{key}_per_step"] = float(value) / (repeats + 1)
    report(results)
    dist.destroy_process_group()
