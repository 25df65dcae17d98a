"""torchtitan: the experts of its MoE modules, computed by our kernels in its own model.

A module keeps its place, parameters (`w1_EFD`, `w2_EDF`, `w3_EFD`), initialisation, sharding and checkpoint names; its
forward alone is ours. Where tokens stay on their rank the layer goes from choices to output in our kernels, without the
`[T*K, D]` copies of sorting and of scattering back. Where torchtitan exchanges tokens, its dispatcher stays, and each
rank's sorted rows are computed here.

Everything is cast to bf16, as torchtitan does. Gate and up are put side by side in that cast: one bf16 copy of both a
forward.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher

from .. import ops
from ..autograd import moe_mlp
from ..compiled import moe_mlp_functional
from ..form import ExpertForm
from ..planner.errors import InputError
from ..weights import ExpertWeights

_FORM = ExpertForm()


class RelibraGroupedExperts(GroupedExperts):
    """`GroupedExperts` of torchtitan over our kernels."""

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """x_RD: rows sorted by expert. num_tokens_per_expert_E: integer; rows beyond their sum give zeros."""
        ends_E = num_tokens_per_expert_E.cumsum(0)
        row_R = torch.arange(len(x_RD), device=x_RD.device)
        expert_R = torch.bucketize(row_R, ends_E, right=True)
        expert_R = expert_R.masked_fill(expert_R >= len(ends_E), -1)
        ones = torch.ones(len(x_RD), 1, dtype=torch.float32, device=x_RD.device)
        return self.run(x_RD, ones, expert_R[:, None])

    def run(self, x_TD: Tensor, weights_TK: Tensor, index_TK: Tensor) -> Tensor:
        """The weighted sum over each token's experts, in the dtype of x."""
        w1, w2, w3 = (w.to_local() if isinstance(w, DTensor) else w for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        home = ExpertWeights(torch.cat((w1.bfloat16(), w3.bfloat16()), 1), w2.bfloat16().contiguous())
        x, weights = x_TD.bfloat16().contiguous(), weights_TK.contiguous()
        if torch.compiler.is_compiling():
            return moe_mlp_functional(x, weights, index_TK, home, _FORM).type_as(x_TD)
        return moe_mlp(x, weights, ops.build_schedule(index_TK, len(w2)), home, _FORM).type_as(x_TD)


class RelibraRoutedExperts(RoutedExperts):
    """`RoutedExperts` of torchtitan: one MoE MLP where tokens stay on their rank, else with its own dispatcher."""

    def forward(
        self,
        x_BLD: Tensor,
        topk_scores_BLK: Tensor,
        topk_expert_ids_BLK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        """Returns [B, L, D]. The counts are for torchtitan's dispatchers: our schedule is made from the choices."""
        if not _keeps_tokens(self.token_dispatcher):
            return super().forward(x_BLD, topk_scores_BLK, topk_expert_ids_BLK, num_local_tokens_per_expert_E)
        scores_TK, ids_TK = topk_scores_BLK.flatten(0, 1), topk_expert_ids_BLK.flatten(0, 1)
        return self.inner_experts.run(x_BLD.flatten(0, 1), scores_TK, ids_TK).view_as(x_BLD)


def _keeps_tokens(dispatcher: LocalTokenDispatcher) -> bool:
    """Whether a dispatcher, as its mesh is wired now, does no more than sort tokens of this rank."""
    if type(dispatcher) is AllToAllTokenDispatcher:
        return dispatcher.ep_mesh is None
    return type(dispatcher) is LocalTokenDispatcher


def replace_experts(model: nn.Module) -> int:
    """Compute the experts of every MoE module of a torchtitan model by our kernels, in place; how many there were.

    Call it on the model as its config builds it, before `parallelize`.

    Raises: InputError where there is none, or one is of another kind (a quantised one, gpt-oss's), or parallelized
    already; nothing is changed then.
    """
    inner = [(name, module) for name, module in model.named_modules() if isinstance(module, GroupedExperts)]
    if not inner:
        raise InputError(f"model is a {type(model).__name__} without a GroupedExperts of torchtitan")
    routed = [module for module in model.modules() if type(module) is RoutedExperts]
    for name, module in inner:
        if type(module) not in (GroupedExperts, RelibraGroupedExperts):
            raise InputError(f"{name} is a {type(module).__name__}; it must be torchtitan's GroupedExperts itself")
    for each in (*(module for _, module in inner), *routed):
        if "forward" in vars(each):
            raise InputError(f"the model's {type(each).__name__} is parallelized already; replace experts before that")
    for _, module in inner:
        module.__class__ = RelibraGroupedExperts
    for module in routed:
        module.__class__ = RelibraRoutedExperts
    return len(inner)
