"""Megatron-core: which of its configs we take, and what its routers choose while they are replayed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..form import ExpertForm
from ..planner.errors import InputError
from ..router import comparison_of

__all__ = ["RecordedChoice", "expert_form"]


def expert_form(config: Any) -> ExpertForm:
    """The form of a config's experts. Raises: InputError, naming what we do not compute or would pass over."""
    silu = torch.nn.functional.silu
    for name, wanted in (
        ("gated_linear_unit", True),
        ("add_bias_linear", False),
        ("moe_apply_probs_on_input", False),
        ("moe_latent_size", None),
        ("moe_expert_capacity_factor", None),
        ("expert_tensor_parallel_size", 1),
        ("activation_func_clamp_value", None),
        ("fp8", None),
        ("fp4", None),
        ("moe_router_fusion", False),  # the fused router asks no recorded choice
        ("moe_shared_expert_overlap", False),  # its shared experts leave their communication to Megatron's dispatcher
        ("overlap_moe_expert_parallel_comm", False),  # runs the parts of Megatron's own layer
        ("delay_wgrad_compute", False),
    ):
        value = getattr(config, name, wanted)
        if value != wanted and not (value is None and wanted in (1, False)):
            raise InputError(f"{name} is {value!r}; relibra computes experts with {name}={wanted!r} only")
    if config.moe_router_load_balancing_type == "sinkhorn":
        raise InputError("moe_router_load_balancing_type is 'sinkhorn', whose choice cannot be replayed")
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        raise InputError(
            f"sequence_parallel is {config.sequence_parallel!r}, but must be True where tensor_model_parallel_size is "
            f"{config.tensor_model_parallel_size}: every rank routes its own tokens"
        )
    graphs = getattr(config, "cuda_graph_impl", None) or "none"
    scope = getattr(config, "cuda_graph_modules", None) or getattr(config, "cuda_graph_scope", None) or ["full"]
    captured = {str(getattr(one, "name", one)) for one in ([scope] if isinstance(scope, str) else scope)}
    if graphs != "none" and captured - {"attn", "mlp"}:
        raise InputError(
            f"cuda_graph_impl is {graphs!r} of {sorted(captured)}; only 'attn' and 'mlp' (of dense layers) may be "
            "captured, not MoE layers under a plan"
        )
    if config.activation_func is not silu:
        raise InputError(f"activation_func is {config.activation_func}; it must be torch.nn.functional.silu")
    return ExpertForm()


class RecordedChoice:
    """In the place of a router's `RouterReplay`: answers its top-k with what the runtime has for this forward.

    Where the runtime has nothing, what was there before answers: Megatron's, or verl's own class, whose other
    attributes are reached through this object. Rows of -1 are chosen live.
    """

    def __init__(self, router: nn.Module, top_k: int):
        self.before: Any = getattr(router, "router_replay", None)
        self.top_k = top_k
        self.replay: Callable[[], tuple[Tensor | None, bool] | None] | None = None
        self.recorded: Tensor | None = None  # of the forward that runs now
        self._complete = False

    def __getattr__(self, name: str) -> Any:
        before = self.__dict__.get("before")
        if before is None or name.startswith("__"):
            raise AttributeError(f"RecordedChoice has no {name!r}, and no RouterReplay was there before it")
        return getattr(before, name)

    def begin(self) -> None:
        """Before a forward of the router."""
        self.recorded, self._complete = (None if self.replay is None else self.replay()) or (None, False)

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: Any = None,
        group_topk: Any = None,
        default_compute_topk: Any = None,
    ) -> tuple[Tensor, Tensor]:
        recorded = self.recorded
        if recorded is None and self.before is not None:
            found: tuple[Tensor, Tensor] = self.before.get_replay_topk(
                scores, topk, num_groups, group_topk, default_compute_topk
            )
            return found
        if recorded is not None and recorded.shape != (len(scores), topk):
            raise InputError(f"a router got {len(scores)} tokens and chooses {topk}; its replay is {recorded.shape}")
        compare = comparison_of(self.replay)
        if recorded is None or not self._complete or compare is not None:
            live: Tensor = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)[1]
            if compare is not None and recorded is not None:
                compare(live, recorded)
            recorded = live if recorded is None else torch.where(recorded < 0, live, recorded)
        return scores.gather(1, recorded), recorded
