"""What a planned batch will take, before it runs: bytes, memory and seconds, by the same functions that price plans."""

from dataclasses import dataclass

import numpy as np

from ..cluster import ClusterSpec
from ..loads import total_loads
from ..plan import BatchPlan, static_plan
from .balanced import forced_balanced
from .cost import EXCHANGES, Setting, bytes_of_ranks, exchange, price
from .outcome import Outcome, outcome_of_plan

_LEAST_GAIN = 0.01  # of the static step's time: below it, the price model cannot tell
_BUFFERS = 6  # of rows: what is sent, received and combined forward, and the same backward


@dataclass(frozen=True)
class Estimate:
    """One batch under a plan. Weights are of `ModelShape.parameter_bytes`, gradients in fp32 or wider.

    Bytes that travel over the whole batch, all ranks together (counted from the plan):
        fetched_fast_bytes: fetched replicas, which stay inside nodes. kept_fast_bytes, kept_slow_bytes: kept replicas,
        inside nodes and between them. migration_bytes: experts that change their home, on either network.
    Bytes over the whole batch of the busiest rank, in one direction:
        replica_fast_bytes, replica_slow_bytes: replicas, and between nodes migration too (counted).
        token_fast_bytes, token_slow_bytes: rows of tokens, in every layer and micro-batch those of its busiest rank
        (modelled: estimated from loads).
    Memory of the fullest rank:
        home_weights_bytes, gradient_bytes: weights and fp32 gradient sums of its home slots, all layers.
        kept_bytes: kept replicas with their gradients. fetched_bytes: fetched replicas: weights of two layers and
        gradients of one; with `keep_replicas` weights of all layers (both counted).
        token_buffer_bytes: where rows are sent, received and combined, for the largest layer. activation_bytes: what
        one micro-batch in flight keeps of all layers for backward, without activation recomputation (both modelled).
    Seconds of the step (modelled):
        static_seconds: contiguous homes, no replicas. planned_seconds: under the plan. balanced_seconds: under routing
        forced to be balanced, without replicas; a plan whose copies keep tokens on their node may take less.
        planning_seconds: what the caller waited for the plan, on top of planned_seconds unless the rollout hides it.
    static_max_mean, planned_max_mean: max/mean over ranks, mean over layers and micro-batches.
    does_not_pay: why planning this batch is not worth while; empty where it is.
    must_hide: whether it is worth while only if the rollout hides planning.
    """

    fetched_fast_bytes: int
    kept_fast_bytes: int
    kept_slow_bytes: int
    migration_bytes: int
    replica_fast_bytes: int
    replica_slow_bytes: int
    token_fast_bytes: int
    token_slow_bytes: int
    home_weights_bytes: int
    gradient_bytes: int
    kept_bytes: int
    fetched_bytes: int
    token_buffer_bytes: int
    activation_bytes: int
    static_seconds: float
    planned_seconds: float
    balanced_seconds: float
    planning_seconds: float
    static_max_mean: float
    planned_max_mean: float
    does_not_pay: str
    must_hide: bool

    @property
    def memory_bytes(self) -> int:
        """All kinds of memory together. Optimizer state and everything but the experts come on top."""
        return (
            self.home_weights_bytes
            + self.gradient_bytes
            + self.kept_bytes
            + self.fetched_bytes
            + self.token_buffer_bytes
            + self.activation_bytes
        )


def estimate_plan(
    plan: BatchPlan,
    loads: np.ndarray,
    setting: Setting,
    previous_home: np.ndarray | None = None,
    *,
    planning_seconds: float = 0.0,
) -> Estimate:
    """What `plan` takes for these loads, against static placement and forced balance. Nothing runs.

    Args:
        loads: [L, M, E] or [L, M, R, E], the plan's.
        setting: `PlanOptions.setting(...)`.
        previous_home: [L, E], where the experts are before the batch; None: nothing moves.
        planning_seconds: what making the plan took.
    """
    plan.check_loads(total_loads(loads))
    cluster = ClusterSpec(plan.num_ranks // plan.gpus_per_node, plan.gpus_per_node, plan.num_slots)
    model, keep = setting.model, setting.keep_replicas
    planned = outcome_of_plan(plan, loads, previous_home)
    static = outcome_of_plan(static_plan(loads, cluster), loads)
    coming, going = (bytes_of_ranks(planned, model, way, keep_replicas=keep) for way in ("in", "out"))
    tokens = exchange(planned, setting)
    row_bytes = 2 * model.hidden_size
    at_home = plan.num_layers * plan.home_slots
    stay = planned.pushed_in + planned.far_in  # [L, M, R]
    weights = stay.sum(0) if keep else 2 * stay.max(0)
    imbalance = [_mean_imbalance(each) for each in (static, planned)]
    seconds = [price(each, setting).seconds for each in (static, planned, forced_balanced(total_loads(loads), cluster))]
    does_not_pay = _does_not_pay(*seconds, *imbalance)
    return Estimate(
        fetched_fast_bytes=int(coming["fetched_fast"].sum()),
        kept_fast_bytes=int(coming["kept_fast"].sum()),
        kept_slow_bytes=int(coming["kept_slow"].sum()),
        migration_bytes=int(coming["migration"].sum()),
        replica_fast_bytes=_busiest(coming, going, "fetched_fast", "kept_fast"),
        replica_slow_bytes=_busiest(coming, going, "fetched_slow", "kept_slow", "migration"),
        token_fast_bytes=round(EXCHANGES * row_bytes * float(tokens.near_rows.sum())),
        token_slow_bytes=round(EXCHANGES * row_bytes * float(tokens.far_rows.sum())),
        home_weights_bytes=at_home * model.expert_bytes,
        gradient_bytes=at_home * model.gradient_bytes,
        kept_bytes=int(planned.kept_copies.max(initial=0)) * model.copy_bytes,
        fetched_bytes=int((weights * model.expert_bytes + stay.max(0) * model.gradient_bytes).max(initial=0)),
        token_buffer_bytes=round(_BUFFERS * row_bytes * float(_rows(planned, setting).max(initial=0))),
        activation_bytes=_activation_bytes(planned, setting),
        static_seconds=seconds[0],
        planned_seconds=seconds[1],
        balanced_seconds=seconds[2],
        planning_seconds=planning_seconds,
        static_max_mean=imbalance[0],
        planned_max_mean=imbalance[1],
        does_not_pay=does_not_pay,
        must_hide=not does_not_pay and seconds[1] + planning_seconds >= seconds[0] * (1 - _LEAST_GAIN),
    )


def _busiest(coming: dict[str, np.ndarray], going: dict[str, np.ndarray], *kinds: str) -> int:
    return int(max(np.stack([way[kind] for kind in kinds]).sum(0).max() for way in (coming, going)))


def _rows(outcome: Outcome, setting: Setting) -> np.ndarray:
    """[L, M]: rows that come to the busiest rank: from other ranks, and at most each of its own tokens."""
    tokens = exchange(outcome, setting)
    own = outcome.slot_load.sum((2, 3)) / setting.model.top_k / outcome.slot_load.shape[2]
    return np.asarray(tokens.near_rows + tokens.far_rows + own)


def _activation_bytes(outcome: Outcome, setting: Setting) -> int:
    """Received rows, and gate and up of every assignment, in bf16."""
    gate_up = 2 * setting.model.first_width * outcome.rank_load.sum(0).max(1)  # [M]
    return round(float((2 * setting.model.hidden_size * _rows(outcome, setting).sum(0) + gate_up).max(initial=0)))


def _mean_imbalance(outcome: Outcome) -> float:
    each = outcome.imbalance()
    return float(np.nanmean(each)) if np.isfinite(each).any() else 1.0


def _does_not_pay(static: float, planned: float, balanced: float, static_max_mean: float, max_mean: float) -> str:
    least = static * (1 - _LEAST_GAIN)
    if planned < least:
        return ""
    if balanced >= least:
        return (
            f"even forced balance would save no more than {max(1 - balanced / static, 0) if static else 0:.1%} of the "
            f"static step: routing is even (max/mean {static_max_mean:.2f}), or the experts are a small part of it"
        )
    return (
        f"the planned step takes {planned / static:.3f} of the static one: max/mean goes from {static_max_mean:.2f} to "
        f"{max_mean:.2f}, at the price of replicas and moves; more replica slots or memory for kept replicas may help"
    )
