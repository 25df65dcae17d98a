"""verl: the trace in a batch, and a plan for it. See docs/trainers.md for where to call what.

verl's rollout workers put `routed_experts` into the batch, int16 [bs, prompt + response, L, K] beside `input_ids` and
`attention_mask` (or jagged tensors of all three once padding was removed). The row of the last token is zeros.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..parallel.routed_batch import RoutedBatch
from ..planner import ClusterSpec, PlanOptions, RoutingTrace, from_verl
from ..planner.errors import InputError
from .batches import PlannedBatch, plan_routed_batch, to_numpy


def trace_of_batch(
    batch: Mapping[str, Any], num_experts: int, *, moe_layer_ids: Sequence[int] | None = None
) -> RoutingTrace:
    """The trace of `DataProto.batch`: sequence i is row i.

    Args:
        batch: has `routed_experts`, and `attention_mask` where it is padded. Where `input_ids` are jagged too, their
            lengths are checked.

    Raises: InputError where there is no routing, or it is not aligned with the mask or the ids.
    """
    if batch.get("routed_experts") is None:
        raise InputError(
            "batch has no 'routed_experts': set actor_rollout_ref.rollout.enable_rollout_routing_replay=True "
            f"(it has {sorted(batch.keys())})"
        )
    routed = batch["routed_experts"]
    if isinstance(routed, torch.Tensor) and routed.is_nested:
        ids = batch.get("input_ids")
        nested = isinstance(ids, torch.Tensor) and ids.is_nested
        token_ids = [row.tolist() for row in ids.unbind()] if nested else None  # type: ignore[union-attr]
        rows = [to_numpy(row) for row in routed.unbind()]
        return from_verl(rows, num_experts, token_ids=token_ids, moe_layer_ids=moe_layer_ids)
    mask = to_numpy(batch["attention_mask"])
    return from_verl(to_numpy(routed), num_experts, attention_mask=mask, moe_layer_ids=moe_layer_ids)


def plan_for_update(
    batch: Mapping[str, Any],
    num_experts: int,
    cluster: ClusterSpec,
    micro_batch_size_per_gpu: int,
    *,
    moe_layer_ids: Sequence[int] | None = None,
    previous_home: np.ndarray | None = None,
    options: PlanOptions | None = None,
) -> PlannedBatch:
    """Call it in `RayPPOTrainer.fit`, after advantages and before `update_actor(batch)`; send the result along.

    Data-parallel ranks get consecutive chunks of the batch, and micro-batches consecutive parts of a chunk, as verl
    deals them out with `use_dynamic_bsz=False`. For dynamic batch sizes, give the micro-batches that verl made to
    `plan_micro_batches`.
    """
    trace = trace_of_batch(batch, num_experts, moe_layer_ids=moe_layer_ids)
    routed = RoutedBatch.from_verl(trace, cluster.num_ranks, micro_batch_size_per_gpu)
    return plan_routed_batch(routed, cluster, previous_home=previous_home, options=options)
