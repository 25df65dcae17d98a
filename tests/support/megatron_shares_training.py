"""A GPT of megatron-core under context and tensor parallelism with sequence parallelism: ranks that share sequences."""

from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from megatron_ranks import example, logical, moving_plan
from torch import Tensor, nn

from relibra_kernels import RoutedBatch, RoutingTrace

LENGTHS = (12, 9, 11, 12, 7, 3, 12, 10)  # padded to 12: four chunks of three
OPTIONS = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}


def rollouts(step: int) -> tuple[Tensor, RoutingTrace]:
    """Padded token ids, and routing of the tokens; also unknown ones where a rank's share of a sequence ends."""
    tokens, whole = example().rollouts(step)
    parts = [whole.expert_ids[i * 12 : i * 12 + length].copy() for i, length in enumerate(LENGTHS)]
    for part in parts:
        part[-1] = -1
    parts[0][8] = parts[3][2] = parts[6][5] = -1  # chunks end after 2, 5, 8
    offsets = np.cumsum([0, *LENGTHS])
    return tokens, RoutingTrace(np.concatenate(parts), offsets, whole.num_experts, whole.moe_layer_ids)


def positions_of(rank: int, size: int) -> Tensor:
    """Of the tokens that a context parallel rank has, as Megatron cuts them."""
    chunks = torch.arange(12).view(2 * size, -1)
    return chunks[[rank, 2 * size - 1 - rank]].flatten()


class OfAllRanks(torch.autograd.Function):
    """[n, ...] -> [ranks * n, ...], one rank's after the other's."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        parts = [torch.empty_like(tensor).contiguous() for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


class GatheredAttention(nn.Module):
    """In the place of Transformer Engine's attention, the only one of Megatron's that knows context parallelism."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **_):
        super().__init__()
        self.group = example().parallel_state.get_context_parallel_group()

    def forward(self, query, key, value, attention_mask, **_):
        size = dist.get_world_size(self.group)
        if size > 1:
            key, value = (OfAllRanks.apply(tensor, self.group) for tensor in (key, value))
            of_key = torch.cat([positions_of(rank, size) for rank in range(size)])
            of_query = positions_of(dist.get_rank(self.group), size)
        else:
            of_key = of_query = torch.arange(12)
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(of_key > of_query[:, None], float("-inf")).softmax(-1)
        return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


def norm_of_sequence_parallel(config, hidden_size, eps=1e-5, **_):
    """In the place of Megatron's torch norm, which refuses sequence parallelism; gradients are summed by the mark."""
    norm = nn.LayerNorm(hidden_size, eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


@contextmanager
def sequence_parallel_norms():
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    before = WrappedTorchNorm.__new__
    WrappedTorchNorm.__new__ = lambda _, *args, **kwargs: norm_of_sequence_parallel(*args, **kwargs)
    try:
        yield
    finally:
        WrappedTorchNorm.__new__ = before


def train(sizes: dict[str, int], steps: int, options: dict) -> dict:
    """Losses, gradients of the first step, parameters after the last, and how those are cut that are.

    sizes: of tensor, context and expert parallelism. cut: (axis, stride) of what tensor parallel ranks have parts of;
        of a gated weight, stride 2, a part of each half.
    """
    module, state = example(), example().parallel_state
    before = min(dist.get_world_size(), 2)
    tensor, context, expert = (sizes.get(name, 1) for name in ("tensor", "context", "expert"))
    state.destroy_model_parallel()
    try:
        state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            context_parallel_size=context,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=1,
        )
        return _train(module, state, steps, options, tensor, context)
    finally:
        state.destroy_model_parallel()
        state.initialize_model_parallel(expert_model_parallel_size=before)


def _train(module, state, steps: int, options: dict, tensor: int, context: int) -> dict:
    from relibra_kernels.integrations.megatron_shares import TokenShare

    class Shared(module.Trainer):
        """Every rank has all sequences of its data parallel rank, and a share of their tokens."""

        def __init__(self, **options):
            super().__init__(**options)
            self.share = TokenShare.of_this_rank(self.model.config)

        def step(self, step: int) -> float:
            tokens, trace = rollouts(step)
            rank, ranks = state.get_data_parallel_rank(), state.get_data_parallel_world_size()
            mine = np.arange(len(tokens))[rank::ranks]
            groups = np.arange(len(mine)) * module.MICRO_BATCHES // len(mine)
            whole = RoutedBatch(trace.select(mine), groups, module.MICRO_BATCHES)
            batch = self.share.of_batch(whole, lambda part: self.share.padded_rows(part, 12))
            copies = ranks * context  # Megatron averages over them
            here = positions_of(state.get_context_parallel_rank(), context) if context > 1 else torch.arange(12)
            self.ddp.zero_grad_buffer()
            total = torch.zeros(())
            plan = moving_plan(self.ep.gather_loads(batch), step + 1)
            with self.ep.batch(plan, batch, module.torch_optimizer(self.optimizer)):
                for m in range(module.MICRO_BATCHES):
                    part = tokens[mine[groups == m]]
                    counts = here < (torch.tensor(LENGTHS)[mine[groups == m]] - 1)[:, None]  # a next token to predict
                    mask = torch.ones(1, 1, len(here), len(here), dtype=torch.bool)  # the attention has its own
                    with self.ep.micro_batch(m):
                        labels = part.roll(-1, 1)[:, here]
                        losses = self.ddp(part[:, here], here.expand(len(part), -1), mask, labels=labels)
                        loss = (losses * counts).sum() / (sum(LENGTHS) - len(LENGTHS)) * copies
                        loss.backward()
                    total += loss.detach() / copies
            module.finalize_model_grads([self.ddp])
            self.optimizer.step()
            dist.all_reduce(total, group=state.get_data_parallel_group(with_context_parallel=True))
            return float(total)

    spec = module.local_spec()
    spec.submodules.self_attention.submodules.core_attention = GatheredAttention
    with sequence_parallel_norms():
        trainer = Shared(
            tensor_model_parallel_size=tensor,
            context_parallel_size=context,
            sequence_parallel=tensor > 1,
            expert_tensor_parallel_size=1,
            layer_spec=spec,
            position_embedding_type="learned_absolute",
            **options,
        )
    losses, gradients = [], {}
    for step in range(steps):
        losses.append(trainer.step(step))
        if step == 0:
            gradients = logical(trainer, lambda p: p.main_grad)
    cut = {
        name: (p.partition_dim, p.partition_stride)
        for name, p in trainer.model.named_parameters()
        if getattr(p, "tensor_model_parallel", False) and tensor > 1
    }
    stats = trainer.ep.stats()
    return {
        "losses": losses,
        "gradients": gradients,
        "parameters": logical(trainer, lambda p: p.data),
        "cut": cut,
        "tensor_rank": state.get_tensor_model_parallel_rank(),
        "copies": stats.replicas,
        "moved": bool((trainer.ep.home != np.arange(8) // (8 // trainer.ep.comm.size)).any()),
    }


def part_of(tensor: Tensor, cut: tuple[int, int], rank: int, size: int) -> Tensor:
    """What one tensor parallel rank has."""
    axis, stride = cut
    return torch.cat([half.chunk(size, axis)[rank] for half in tensor.chunk(stride, axis)], axis)
