"""Top-k routing with replay of recorded expert choices."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from .planner.errors import InputError, ShapeError


def comparison_of(replay: object) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
    """The function to call with (live ids, recorded ids) of this forward; None where the replay does not ask for it."""
    compare = getattr(replay, "compare", None)
    return None if compare is None else compare()


class TopKRouter(nn.Module):
    """Scores every expert and picks `top_k`, live or as recorded.

    "softmax": softmax over all experts, the k largest, renormalised to sum 1 with `normalize` (Qwen3, Mixtral).
    "sigmoid": sigmoid scores; chosen by score + `e_score_correction_bias` among the `groups_per_token` groups
    whose two best sum highest; weights are the scores without the bias (DeepSeek-V3).
    Scores are in fp32, or in float64 for float64.

    Forward: hidden_states `[..., H]` -> (router_logits `[T, E]`, weights `[T, K]`, indices `[T, K]`), as Hugging Face.

    The expert-parallel runtime sets `replay`, an object that gives each micro-batch its own recorded ids. The router
    then calls it in every forward, instead of reading `recorded`:
        replay(): (ids int64 `[T, K]`, whether no row is -1), or None where the router is to choose.
        replay.compare(), if there is such a method: a function of (live ids, recorded ids) that the router calls with
            both, or None.
        replay.compiled(logits, top_k): the ids `[T, K]`, while torch.compile traces.
    """

    e_score_correction_bias: torch.Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: Literal["softmax", "sigmoid"] = "softmax",
        normalize: bool = True,
        num_groups: int = 1,
        groups_per_token: int = 1,
        routed_scaling_factor: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not super(): integrations mix in the router class of their framework
        if scoring not in ("softmax", "sigmoid"):
            raise InputError(f"scoring is {scoring!r}; it must be 'softmax' or 'sigmoid'")
        if not 1 <= top_k <= num_experts:
            raise InputError(f"top_k is {top_k}; it must lie in 1..num_experts, which is {num_experts}")
        if num_groups < 1 or num_experts % num_groups or not 1 <= groups_per_token <= num_groups:
            raise InputError(
                f"num_groups is {num_groups} and groups_per_token {groups_per_token}; num_groups must divide "
                f"num_experts, which is {num_experts}, and groups_per_token must lie in 1..num_groups"
            )
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.scoring, self.normalize, self.routed_scaling_factor = scoring, normalize, routed_scaling_factor
        self.num_groups, self.groups_per_token = num_groups, groups_per_token
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype, device=device))
        nn.init.normal_(self.weight, std=0.02)
        if scoring == "sigmoid":
            bias = torch.zeros(num_experts, dtype=torch.float32, device=device)
            self.register_buffer("e_score_correction_bias", bias)
        self._recorded: torch.Tensor | None = None
        self._all_recorded = False
        self._record: list[torch.Tensor] | None = None
        self.replay: Callable[[], tuple[torch.Tensor, bool] | None] | None = None

    @property
    def recorded(self) -> torch.Tensor | None:
        """Expert ids to use in the next forward, int `[T, K]`, or None. A row of -1 is routed live.

        Checked when set, so that no forward has to wait for the device. It stays until it is set again.
        """
        return self._recorded

    @recorded.setter
    def recorded(self, indices_TK: torch.Tensor | None) -> None:
        if indices_TK is None:
            self._recorded = None
            return
        if indices_TK.ndim != 2 or indices_TK.shape[1] != self.top_k or indices_TK.is_floating_point():
            raise ShapeError(
                f"recorded is {indices_TK.dtype} {tuple(indices_TK.shape)}; it must be integers [T, {self.top_k}]"
            )
        unknown = self._check_recorded(indices_TK)
        self._all_recorded = not unknown
        self._recorded = indices_TK.to(device=self.weight.device, dtype=torch.int64)

    def _check_recorded(self, indices_TK: torch.Tensor) -> bool:
        """Refuse rows that no top-k gives; return whether some rows are unknown."""
        if indices_TK.numel() == 0:
            return False
        ids = indices_TK.long()
        low, high = int(ids.min()), int(ids.max())
        if low < -1 or high >= self.num_experts:
            raise InputError(f"recorded holds ids {low}..{high}; they must lie in -1..{self.num_experts - 1}")
        unknown_T = (ids < 0).any(1)
        partly = unknown_T & (ids >= 0).any(1)
        ordered = ids.sort(1).values
        duplicate = (ordered[:, 1:] == ordered[:, :-1]).any(1) & ~unknown_T
        for rows, what in ((partly, "is recorded in part"), (duplicate, "names an expert twice")):
            if rows.any():
                row = int(rows.nonzero()[0])
                raise InputError(f"recorded row {row} {what}: {ids[row].tolist()}; it must be distinct ids, or all -1")
        return bool(unknown_T.any())

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x_TH = hidden_states if hidden_states.ndim == 2 else hidden_states.reshape(-1, self.hidden_size)
        exact = torch.promote_types(x_TH.dtype, torch.float32)
        if self.scoring == "softmax":
            logits_TE = nn.functional.linear(x_TH, self.weight)
            indices_TK = self._indices(logits_TE)
            if self.normalize:  # to sum 1 over the chosen: their softmax, without that of the others
                weights_TK = logits_TE.gather(1, indices_TK).softmax(-1, dtype=exact)
            else:
                weights_TK = logits_TE.softmax(-1, dtype=exact).gather(1, indices_TK)
        else:
            logits_TE = nn.functional.linear(x_TH.to(exact), self.weight.to(exact))
            indices_TK = self._indices(logits_TE)
            weights_TK = logits_TE.gather(1, indices_TK).sigmoid()
            if self.normalize:
                weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        if self.routed_scaling_factor != 1.0:
            weights_TK = weights_TK * self.routed_scaling_factor
        if self._record is not None:
            self._record.append(indices_TK.clone())
        return logits_TE, weights_TK.to(logits_TE.dtype), indices_TK

    def _indices(self, logits_TE: torch.Tensor) -> torch.Tensor:
        recorded, all_recorded = self._recorded, self._all_recorded
        if self.replay is not None:
            if torch.compiler.is_compiling() and hasattr(self.replay, "compiled"):
                recorded, all_recorded = self.replay.compiled(logits_TE, self.top_k), False
            else:
                recorded, all_recorded = self.replay() or (None, False)
        if recorded is None:
            return self._select(logits_TE)
        if recorded.shape[0] != logits_TE.shape[0]:
            raise ShapeError(f"recorded has {recorded.shape[0]} rows and the input {logits_TE.shape[0]} tokens")
        compare = None if torch.compiler.is_compiling() else comparison_of(self.replay)
        if all_recorded and compare is None:
            return recorded
        live = self._select(logits_TE)
        if compare is not None:
            compare(live, recorded)
        return recorded if all_recorded else torch.where(recorded < 0, live, recorded)

    def _select(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """The router's own choice."""
        logits_TE = logits_TE.detach()
        if self.scoring == "softmax":
            exact = torch.promote_types(logits_TE.dtype, torch.float32)
            return logits_TE.softmax(-1, dtype=exact).topk(self.top_k, dim=-1).indices
        choice_TE = logits_TE.sigmoid() + self.e_score_correction_bias
        if self.groups_per_token < self.num_groups:
            grouped = choice_TE.unflatten(1, (self.num_groups, -1))
            best_two = grouped.topk(min(2, grouped.shape[2]), dim=-1).values.sum(-1)
            open_groups = best_two.topk(self.groups_per_token, dim=-1, sorted=False).indices
            closed = torch.ones_like(best_two, dtype=torch.bool).scatter_(1, open_groups, False)
            choice_TE = grouped.masked_fill(closed[:, :, None], float("-inf")).flatten(1)
        return choice_TE.topk(self.top_k, dim=-1, sorted=False).indices

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, scoring={self.scoring}"


@contextmanager
def replay_routing(routers: Sequence[TopKRouter], indices_TLK: torch.Tensor) -> Iterator[None]:
    """Within the block, router l uses `indices[:, l]` in every forward. Rows of -1 are routed live.

    Run backward inside the block too where activations are recomputed (checkpointing), since that routes again.
    """
    if indices_TLK.ndim != 3 or indices_TLK.shape[1] != len(routers):
        raise ShapeError(f"indices is {tuple(indices_TLK.shape)}; it must be [T, {len(routers)} layers, K]")
    before = [router.recorded for router in routers]
    try:
        for layer, router in enumerate(routers):
            router.recorded = indices_TLK[:, layer]
        yield
    finally:
        for router, recorded in zip(routers, before, strict=True):
            router.recorded = recorded


@contextmanager
def record_routing(routers: Sequence[TopKRouter]) -> Iterator[list[list[torch.Tensor]]]:
    """Yields `recorded[layer][call]`: the indices `[T, K]` of every forward of every router within the block."""
    recorded: list[list[torch.Tensor]] = [[] for _ in routers]
    before = [router._record for router in routers]
    try:
        for router, calls in zip(routers, recorded, strict=True):
            router._record = calls
        yield recorded
    finally:
        for router, calls_before in zip(routers, before, strict=True):
            router._record = calls_before
