"""slime: the trace in its rollout data, and a plan for it. See docs/trainers.md for where to call what.

With `--use-rollout-routing-replay`, slime's rollout data holds `rollout_routed_experts`, int32
[len(tokens) - 1, layers, K] a sample, beside `tokens`; dense layers are zeros.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from ..parallel.routed_batch import RoutedBatch
from ..planner import ClusterSpec, PlanOptions, RoutingTrace, from_slime
from ..planner.errors import InputError
from ..planner.formats.sequences import Holes, RecordOptions, listed
from ..planner.formats.verl import needed_tokens
from .batches import PlannedBatch, plan_routed_batch
from .megatron import replays_of


def trace_of_rollout(
    rollout_data: Mapping[str, Any],
    num_experts: int,
    *,
    moe_layer_ids: Sequence[int] | None = None,
    holes: Holes = "refuse",
) -> RoutingTrace:
    """The trace of `rollout_data`: sequence i is sample i, checked against its tokens.

    Args:
        rollout_data: `tokens` and `rollout_routed_experts`, whose entry may be None for an aborted sample; with
            `routed_experts_start_len` of each sample where rows begin later. `loss_masks` of the responses say which
            tokens were generated: the others (tool results) need no routing.
        holes: of a token that needs routing and has none: "refuse" the batch, or leave the token "unknown".
    """
    missing = [key for key in ("rollout_routed_experts", "tokens") if rollout_data.get(key) is None]
    if missing:
        raise InputError(
            f"rollout_data has no {missing[0]!r}: start slime with --use-rollout-routing-replay "
            f"(it has {sorted(rollout_data)})"
        )
    masks = rollout_data.get("loss_masks")
    if masks is not None:
        masks = [partial(needed_tokens, mask) for mask in listed("loss_masks", masks)]
    return from_slime(
        rollout_data["rollout_routed_experts"],
        num_experts,
        token_ids=rollout_data["tokens"],
        starts=rollout_data.get("routed_experts_start_len"),
        masks=masks,
        moe_layer_ids=moe_layer_ids,
        holes=holes,
    )


def plan_for_train(
    rollout_data: Mapping[str, Any],
    num_experts: int,
    cluster: ClusterSpec,
    micro_batch_indices_of_rank: Sequence[Sequence[Sequence[int]]],
    *,
    partition_of_rank: Sequence[Sequence[int]] | None = None,
    previous_home: np.ndarray | None = None,
    options: PlanOptions | None = None,
    **record: Unpack[RecordOptions],
) -> PlannedBatch:
    """Call it once the samples are partitioned, before the trainer's `train` starts.

    Args:
        micro_batch_indices_of_rank: for every rank of the expert-parallel group, slime's `micro_batch_indices`.
        partition_of_rank: the samples of every rank, into which those indices point. None: they are the numbers of
            samples in `rollout_data`.
        record: `moe_layer_ids` and `holes`, as for `trace_of_rollout`.
    """
    trace = trace_of_rollout(rollout_data, num_experts, **record)
    if partition_of_rank is None:
        routed = RoutedBatch.from_micro_batches(trace, micro_batch_indices_of_rank)
    else:
        routed = RoutedBatch.from_slime(trace, partition_of_rank, micro_batch_indices_of_rank)
    return plan_routed_batch(routed, cluster, previous_home=previous_home, options=options)


def feed_replay(targets: Sequence[Tensor], model: Any) -> None:
    """Give the routers of `model` one more micro-batch to replay, for slime's patched top-k: `RoutingReplay.record`.

    What slime's actor does itself in `fill_routing_replay`, for targets of our own making: those of another record, of
    `ep.record()`, or of a rank's share of the tokens. Call it once a micro-batch, in their order, before
    `ROUTING_REPLAY_STAGE` is "replay_forward"; `RoutingReplay.clear_all()` drops them.

    Args:
        targets: of `megatron.replay_targets`, a router each: int64 [tokens fed, K].
        model: the module, or a list of them, as for `megatron.replaying`; those of multi-token prediction are fed only
            where there are targets for them.

    Raises: InputError where there is another number of routers than of targets, or a row is to be routed live, which
        slime's replay cannot do. Nothing is fed then.
    """
    replays = replays_of(model, len(targets), "routing_replay")
    if len(replays) != len(targets):
        raise InputError(
            f"targets are for {len(targets)} routers, but model has {len(replays)} with slime's RoutingReplay "
            "(ENABLE_ROUTING_REPLAY=1 when it is made)"
        )
    for index, target in enumerate(targets):
        live = (target < 0).any(1).nonzero()
        if len(live):
            raise InputError(
                f"targets[{index}] has -1 in row {int(live[0])}; slime's replay routes no row live: have "
                "replay_targets refuse holes"
            )
    for replay, target in zip(replays, targets, strict=True):
        replay.record(target.to(torch.int32).contiguous())
