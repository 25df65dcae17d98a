"""Make a router choose the recorded experts: its call that selects (`torch.topk`) returns the recorded ids. Everything
else that the router computes is unchanged.

Almost every family selects with `torch.topk` over its scores; Phi-3.5-MoE with `max`, one expert after the other; the
first layers of DeepSeek-V4 look the token id up in a table.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class AnswerTopK(TorchFunctionMode):
    """Answers a router's choice of experts, and the choice of groups before it, with what was recorded.

    recorded_TK: int64, -1 in the rows of tokens that are routed live
    keep_live:   whether `live`, [T, K], is wanted: what the router would have chosen (of the groups that were recorded)
    """

    def __init__(self, router: nn.Module, num_experts: int, top_k: int, recorded_TK: Tensor, all_known: bool):
        super().__init__()
        self._recorded, self._all_known = recorded_TK, all_known
        self._num_experts, self._top_k = num_experts, top_k
        self._groups = int(getattr(router, "num_group", None) or 1)
        self._groups_per_token = getattr(router, "topk_group", None)
        self.keep_live = self.answered = False
        self.live: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.topk and func is not torch.Tensor.topk:
            return func(*args, **kwargs)
        scores = args[0] if args else kwargs["input"]
        k = args[1] if len(args) > 1 else kwargs["k"]
        if scores.ndim == 2 and scores.shape[1] == self._groups and k == self._groups_per_token:
            scores = scores.masked_fill(self._recorded_groups(), float("inf"))
            return scores.topk(k, dim=-1)
        if scores.ndim < 2 or scores.shape[-1] != self._num_experts or k != self._top_k:
            return func(*args, **kwargs)
        self.answered = True
        indices = self._recorded.reshape(*scores.shape[:-1], k)
        if self.keep_live or not self._all_known:
            live = scores.detach().topk(k, dim=-1).indices
            self.live = live.reshape(-1, k)
            indices = torch.where(indices < 0, live, indices)
        return torch.return_types.topk((scores.gather(-1, indices), indices))

    def _recorded_groups(self) -> Tensor:
        """bool [T, G]: a router that closes other groups must leave those of the recorded experts open."""
        group_TK = self._recorded.clamp(min=0) // (self._num_experts // self._groups)
        hit_TG = torch.zeros(len(group_TK), self._groups, device=group_TK.device)
        return hit_TG.scatter_add(1, group_TK, (self._recorded >= 0).to(hit_TG.dtype)) > 0


class AnswerMax(TorchFunctionMode):
    """The same for Phi-3.5-MoE's router. It takes K times a maximum over all scores but those chosen before.

    In training the choice is a sampled one: a threshold (`max` with keepdim, which must let the recorded expert pass),
    then the sample (`max` without), then a maximum over probabilities, which is not a choice.
    """

    def __init__(self, router: nn.Module, num_experts: int, top_k: int, recorded_TK: Tensor, all_known: bool):
        super().__init__()
        self._recorded, self._num_experts, self._top_k = recorded_TK, num_experts, top_k
        self._per_choice = 3 if router.training else 1
        self._calls, self._live = 0, list[Tensor]()
        self.keep_live = False

    @property
    def answered(self) -> bool:
        return self._calls == self._per_choice * self._top_k

    @property
    def live(self) -> Tensor | None:
        return torch.stack(self._live, 1) if self._live else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.max or not isinstance(out, torch.return_types.max):
            return out
        scores = args[0]
        if scores.shape[-1] != self._num_experts or self.answered:
            return out
        choice, step = divmod(self._calls, self._per_choice)
        self._calls += 1
        if step == 0 and self.keep_live:
            self._live.append(out[1].reshape(-1))
        if step == 2:
            return out
        recorded = self._recorded[:, choice].reshape(out[1].shape)
        indices = torch.where(recorded < 0, out[1], recorded)
        at = indices if indices.ndim == scores.ndim else indices.unsqueeze(-1)
        return torch.return_types.max((scores.gather(-1, at).reshape(out[0].shape), indices))


class AnswerTable(TorchFunctionMode):
    """The same for DeepSeek-V4's hash router, which reads the experts of a token from its table of token ids."""

    def __init__(self, router: nn.Module, num_experts: int, top_k: int, recorded_TK: Tensor, all_known: bool):
        super().__init__()
        self._table, self._recorded = router.tid2eid, recorded_TK
        self.keep_live = self.answered = False
        self.live: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.__getitem__ or args[0] is not self._table:
            return out
        self.answered, self.live = True, out
        return torch.where(self._recorded < 0, out, self._recorded.to(out.dtype))


_OTHERS: dict[str, type[AnswerMax] | type[AnswerTable]] = {
    "PhimoeTopKRouter": AnswerMax,
    "DeepseekV4HashRouter": AnswerTable,
}


def answer_of(router: nn.Module) -> type[AnswerTopK] | type[AnswerMax] | type[AnswerTable]:
    return _OTHERS.get(type(router).__name__, AnswerTopK)
