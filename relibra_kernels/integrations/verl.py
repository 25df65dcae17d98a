"""verl: the trace in a batch, and a plan for it. See docs/trainers.md for where to call what.

verl's rollout workers put `routed_experts` into the batch, [bs, prompt + response, L, K] beside `input_ids` and
`attention_mask` (or jagged tensors of all three once padding was removed). Rows without routing are zeros: the last
token's, tool results after the last generation, and those of the samples that verl adds to fill up a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import torch

from ..parallel.routed_batch import RoutedBatch
from ..planner import ClusterSpec, PlanOptions, RoutingTrace, from_verl
from ..planner.errors import InputError
from ..planner.formats.sequences import Holes, RecordOptions
from .batches import PlannedBatch, plan_micro_batches, plan_routed_batch


def trace_of_batch(
    batch: Mapping[str, Any],
    num_experts: int,
    *,
    moe_layer_ids: Sequence[int] | None = None,
    holes: Holes = "refuse",
) -> RoutingTrace:
    """The trace of `DataProto.batch`: sequence i is row i.

    Args:
        batch: has `routed_experts`, and `attention_mask` where it or its masks are padded. Where `input_ids` are jagged
            too, their lengths are checked. Of its masks, `response_mask` says which tokens were generated: the others
            (tool results, padding samples) need no routing; and `replay_mask` which are replayed: the others are
            unknown.
        holes: of a token that needs routing and has none: "refuse" the batch, or leave the token "unknown".

    Raises: InputError where there is no routing, or it is not aligned with the mask or the ids.
    """
    if batch.get("routed_experts") is None:
        raise InputError(
            "batch has no 'routed_experts': set actor_rollout_ref.rollout.enable_rollout_routing_replay=True "
            f"(it has {sorted(batch.keys())})"
        )
    routed = batch["routed_experts"]
    jagged, ids = _is_jagged(routed), batch.get("input_ids")
    return from_verl(
        routed,
        num_experts,
        attention_mask=batch.get("attention_mask"),
        response_mask=batch.get("response_mask"),
        replay_mask=batch.get("replay_mask"),
        num_tokens=[len(row) for row in ids.unbind()] if jagged and _is_jagged(ids) else None,  # type: ignore[union-attr]
        moe_layer_ids=moe_layer_ids,
        holes=holes,
    )


def _is_jagged(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_nested


def plan_for_update(
    batch: Mapping[str, Any],
    num_experts: int,
    cluster: ClusterSpec,
    micro_batch_size_per_gpu: int,
    *,
    previous_home: np.ndarray | None = None,
    options: PlanOptions | None = None,
    **record: Unpack[RecordOptions],
) -> PlannedBatch:
    """Call it in `RayPPOTrainer.fit`, after advantages and before `update_actor(batch)`; send the result along.

    Data-parallel ranks get consecutive chunks of the batch, and micro-batches consecutive parts of a chunk, as verl
    deals them out with `use_dynamic_bsz=False`. For dynamic batch sizes, give the micro-batches that verl made to
    `plan_micro_batches`. `moe_layer_ids` and `holes` are as for `trace_of_batch`.
    """
    trace = trace_of_batch(batch, num_experts, **record)
    routed = RoutedBatch.from_verl(trace, cluster.num_ranks, micro_batch_size_per_gpu)
    return plan_routed_batch(routed, cluster, previous_home=previous_home, options=options)


def plan_mini_batches(
    trace: RoutingTrace,
    cluster: ClusterSpec,
    mini_batch_size_per_gpu: int,
    micro_batch_size_per_gpu: int,
    *,
    epochs: int = 1,
    previous_home: np.ndarray | None = None,
    options: PlanOptions | None = None,
) -> Iterator[tuple[np.ndarray, PlannedBatch]]:
    """One plan for each optimizer step of a PPO update, in the order in which verl takes them.

    Each rank's consecutive chunk of the batch is cut into mini-batches (`ppo_mini_batch_size`, per GPU as the worker
    has it), and each of those into micro-batches; `ppo_epochs` goes over all of them again. Without shuffling.

    Args:
        trace: `trace_of_batch(batch, num_experts)`.

    Yields: (numbers of the batch's rows in this step, int64 in the order of the plan's trace; the plan, which starts
        from the homes of the one before).
    Raises: InputError where the batch does not divide.
    """
    each, left = divmod(trace.num_sequences, cluster.num_ranks)
    sizes = {"micro_batch_size_per_gpu": micro_batch_size_per_gpu, "mini_batch_size_per_gpu": mini_batch_size_per_gpu}
    whole = {"micro_batch_size_per_gpu": mini_batch_size_per_gpu, "mini_batch_size_per_gpu": each}
    for name, size in sizes.items():
        if size < 1 or left or whole[name] % size:
            raise InputError(
                f"{name} is {size}, but must divide {whole[name]}: {trace.num_sequences} sequences over "
                f"{cluster.num_ranks} ranks, in mini-batches of {mini_batch_size_per_gpu} a rank"
            )
    if epochs < 1:
        raise InputError(f"epochs is {epochs}, but must be at least 1")
    rows_RN = np.arange(trace.num_sequences).reshape(cluster.num_ranks, each)
    within = np.arange(cluster.num_ranks * mini_batch_size_per_gpu)
    dealt = within.reshape(cluster.num_ranks, -1, micro_batch_size_per_gpu).tolist()
    for start in list(range(0, each, mini_batch_size_per_gpu)) * epochs:
        rows = rows_RN[:, start : start + mini_batch_size_per_gpu].reshape(-1)
        planned = plan_micro_batches(trace.select(rows), dealt, cluster, previous_home=previous_home, options=options)
        previous_home = planned.plan.home
        yield rows, planned
