"""slime: the trace in its rollout data, and a plan for it. See docs/trainers.md for where to call what.

With `--use-rollout-routing-replay`, slime's rollout data holds `rollout_routed_experts`, int32
[len(tokens) - 1, layers, K] a sample, beside `tokens`; dense layers are zeros.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..parallel.routed_batch import RoutedBatch
from ..planner import ClusterSpec, PlanOptions, RoutingTrace, from_slime
from ..planner.errors import InputError
from .batches import PlannedBatch, plan_routed_batch, to_numpy


def trace_of_rollout(
    rollout_data: Mapping[str, Any], num_experts: int, *, moe_layer_ids: Sequence[int] | None = None
) -> RoutingTrace:
    """The trace of `rollout_data`: sequence i is sample i, checked against its tokens."""
    missing = [key for key in ("rollout_routed_experts", "tokens") if rollout_data.get(key) is None]
    if missing:
        raise InputError(
            f"rollout_data has no {missing[0]!r}: start slime with --use-rollout-routing-replay "
            f"(it has {sorted(rollout_data)})"
        )
    routed = [to_numpy(sample) for sample in rollout_data["rollout_routed_experts"]]
    tokens = [to_numpy(sample).tolist() for sample in rollout_data["tokens"]]
    return from_slime(routed, num_experts, token_ids=tokens, moe_layer_ids=moe_layer_ids)


def plan_for_train(
    rollout_data: Mapping[str, Any],
    num_experts: int,
    cluster: ClusterSpec,
    micro_batch_indices_of_rank: Sequence[Sequence[Sequence[int]]],
    *,
    partition_of_rank: Sequence[Sequence[int]] | None = None,
    moe_layer_ids: Sequence[int] | None = None,
    previous_home: np.ndarray | None = None,
    options: PlanOptions | None = None,
) -> PlannedBatch:
    """Call it once the samples are partitioned, before the trainer's `train` starts.

    Args:
        micro_batch_indices_of_rank: for every rank of the expert-parallel group, slime's `micro_batch_indices`.
        partition_of_rank: the samples of every rank, into which those indices point. None: they are the numbers of
            samples in `rollout_data`.
    """
    trace = trace_of_rollout(rollout_data, num_experts, moe_layer_ids=moe_layer_ids)
    if partition_of_rank is None:
        routed = RoutedBatch.from_micro_batches(trace, micro_batch_indices_of_rank)
    else:
        routed = RoutedBatch.from_slime(trace, partition_of_rank, micro_batch_indices_of_rank)
    return plan_routed_batch(routed, cluster, previous_home=previous_home, options=options)
