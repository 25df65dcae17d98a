"""What the demo compares: for the same batches, static placement, our plans, and routing balanced by force."""

import time
from dataclasses import dataclass

import numpy as np

from ...planner import BatchPlan, ClusterSpec, PlanOptions, RoutingTrace, count_loads, plan_batch, static_plan
from .rollout import Rollouts

RANKS = 2
CLUSTER = ClusterSpec(num_nodes=1, gpus_per_node=RANKS, replica_slots=2)
MICRO_BATCHES = 4
MODEL_NAME = "demo-qwen3-moe"


@dataclass(frozen=True)
class Policy:
    """How one of the compared runs routes and places: for each batch, the trace that is replayed and its plan.

    loads: int64 [L, M, R] for each batch, assignments that each rank computes.
    """

    traces: list[RoutingTrace]
    plans: list[BatchPlan]
    loads: list[np.ndarray]


def micro_batch_of_sequence(trace: RoutingTrace) -> np.ndarray:
    """Consecutive sequences, so that micro-batches differ in length."""
    return np.arange(trace.num_sequences) * MICRO_BATCHES // trace.num_sequences


def make_policies(batches: list[Rollouts]) -> tuple[dict[str, Policy], float]:
    """Static placement, our plans, and routing that is balanced by force, for the same batches; seconds of one plan.

    The batches are trained on in turns, so each plan starts from the homes of the other one's.
    """
    recorded = [rollouts.trace for rollouts in batches]
    tables = [count_loads(trace, micro_batch_of_sequence(trace), MICRO_BATCHES) for trace in recorded]
    home, planned = None, []
    start = time.perf_counter()
    for table in (tables[-1], *tables):
        options = PlanOptions(balance=1.0)
        planned.append(plan_batch(table, CLUSTER, previous_home=home, model=MODEL_NAME, options=options))
        home = planned[-1].home
    seconds = (time.perf_counter() - start) / len(planned)
    balanced = [_balanced_trace(trace) for trace in recorded]
    balanced_tables = [count_loads(trace, micro_batch_of_sequence(trace), MICRO_BATCHES) for trace in balanced]

    def policy(traces: list[RoutingTrace], tables: list[np.ndarray], plans: list[BatchPlan]) -> Policy:
        return Policy(traces, plans, [plan.rank_loads(table) for plan, table in zip(plans, tables, strict=True)])

    return {
        "static": policy(recorded, tables, [static_plan(table, CLUSTER, MODEL_NAME) for table in tables]),
        "planned": policy(recorded, tables, planned[1:]),
        "balanced": policy(
            balanced, balanced_tables, [static_plan(table, CLUSTER, MODEL_NAME) for table in balanced_tables]
        ),
    }, seconds


def _balanced_trace(trace: RoutingTrace) -> RoutingTrace:
    """The same tokens, dealt out to all experts in turn; a token's experts lie apart, so that it visits both ranks."""
    apart = np.arange(trace.top_k) * (trace.num_experts // trace.top_k)
    turn = (np.arange(trace.num_tokens)[:, None] + apart) % trace.num_experts
    dealt = np.broadcast_to(turn[:, None], trace.expert_ids.shape)
    ids = np.where(trace.expert_ids >= 0, dealt, -1).astype(trace.expert_ids.dtype)
    return RoutingTrace(ids, trace.offsets, trace.num_experts, trace.moe_layer_ids)
