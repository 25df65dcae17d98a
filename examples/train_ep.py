"""FSDP2 and expert parallelism on a tiny Qwen3-MoE: torchrun, recorded routing, a plan a step, checkpoints.

Two CPU processes, or four that hold all experts twice::

    torchrun --standalone --nproc-per-node 2 examples/train_ep.py
    torchrun --standalone --nproc-per-node 4 examples/train_ep.py --copies 2

One node of eight GPUs::

    torchrun --standalone --nproc-per-node 8 examples/train_ep.py --device cuda --experts 128

Eight nodes of eight GPUs, the same command on every node, $HEAD being one of them. Experts are spread over all 64 ranks
(`ClusterSpec(8, 8)`); or over two nodes each, four times (`ClusterSpec(2, 8)`: --nodes 2 --copies 4)::

    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id relibra --rdzv-endpoint $HEAD:29500 \
        examples/train_ep.py --device cuda --experts 128 --nodes 8 --copies 1

With --checkpoints FOLDER (seen by all nodes) every step is saved, and a run resumes the last one that is there.

The rollouts are random tokens here, and their routing is recorded by a forward of the model itself; an RL trainer gets
both from its engine. Every step: plan, old log-probabilities without gradients, training, clipping, optimizer step,
weights in logical order for the engine.
"""

import argparse
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from relibra_kernels import ClusterSpec, ExpertParallel, RoutedBatch
from relibra_kernels.integrations.transformers import record_routing, replace_moe_blocks
from relibra_kernels.planner import RoutingTrace

VOCABULARY = 128


def make_model(args: argparse.Namespace) -> Qwen3MoeForCausalLM:
    """The same weights on every rank."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=32,
        num_experts=args.experts,
        num_experts_per_tok=2,
    )
    return Qwen3MoeForCausalLM(config)


def make_rollouts(
    model: Qwen3MoeForCausalLM, steps: int, sequences: int
) -> list[tuple[list[np.ndarray], RoutingTrace]]:
    """Sequences of different lengths with the routing that the whole model gave them; a last token has none."""
    random = np.random.default_rng(0)
    rollouts = []
    for _ in range(steps):
        tokens = [random.integers(0, VOCABULARY, random.integers(8, 33)) for _ in range(sequences)]
        with torch.no_grad(), record_routing(model) as record:
            for sequence in tokens:
                model(torch.from_numpy(sequence[None]))
        rollouts.append((tokens, record.trace(token_ids=[sequence.tolist() for sequence in tokens])))
    return rollouts


def padded_input(tokens: list[np.ndarray], sequences: np.ndarray) -> torch.Tensor:
    """[B, width] token ids, zeros after the end."""
    width = max((len(tokens[i]) for i in sequences), default=1)
    ids = np.zeros((len(sequences), width), np.int64)
    for row, i in enumerate(sequences):
        ids[row, : len(tokens[i])] = tokens[i]
    return torch.from_numpy(ids)


def loss_sum(model: torch.nn.Module, ids: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """Cross entropy of the next token, summed over all but padding; 0 of an empty input, with a graph all the same."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    counted = torch.from_numpy(rows.reshape(ids.shape)[:, 1:].reshape(-1) >= 0)
    return (losses * counted.to(losses)).sum()


def train(args: argparse.Namespace) -> list[float]:
    """The loss of every step that this run made; on every rank of the default group."""
    world, rank = dist.get_world_size(), dist.get_rank()
    group_size = world // args.copies

    model = make_model(args)
    replace_moe_blocks(model)
    rollouts = make_rollouts(model, args.steps, sequences=4 * world)
    model.to(args.device)

    mesh = init_device_mesh(args.device, (args.copies, group_size), mesh_dim_names=("copies", "ep"))
    cluster = ClusterSpec(args.nodes, group_size // args.nodes, replica_slots=2)
    ep = ExpertParallel(model, cluster, mesh, model_name="tiny", reduction="mean")  # first: it shards the experts
    experts = set(ep.expert_parameters())  # FSDP2 shards everything else, over all ranks
    for block in model.model.layers:
        fully_shard(block, ignored_params=experts)
    fully_shard(model, ignored_params=experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    first, losses = 0, []
    if args.checkpoints and args.checkpoints.exists():
        saved = sorted(int(path.name) for path in args.checkpoints.iterdir() if path.name.isdigit())
        if saved:
            ep.load_checkpoint(args.checkpoints / str(saved[-1]), optimizer)
            first = saved[-1] + 1

    for step in range(first, args.steps):
        tokens, trace = rollouts[step]
        everyone = RoutedBatch.from_token_budget(trace, world, tokens_per_micro_batch=64)
        batch = everyone.of_rank(rank)
        inputs = []
        for m in range(batch.num_micro_batches):
            sequences = everyone.sequences(m, rank)
            ids, rows = padded_input(tokens, sequences), everyone.padded_rows(m, rank)
            if not len(sequences):  # a rank without sequences still runs every micro-batch
                ids, rows = torch.zeros((1, 2), dtype=torch.int64), np.full(2, -1)
            inputs.append((ids.to(args.device), rows))

        plan = ep.plan(batch)
        optimizer.zero_grad()
        total = torch.zeros((), device=args.device)
        with ep.batch(plan, batch, optimizer):
            for training in (False, True):  # log-probabilities of before, then training, under one plan
                for m, (ids, rows) in enumerate(inputs):
                    model.set_requires_gradient_sync(m == batch.num_micro_batches - 1)
                    with nullcontext() if training else torch.no_grad(), ep.micro_batch(m, rows):
                        loss = loss_sum(model, ids, rows) * world / trace.num_tokens  # gradients are averaged
                        if training:
                            loss.backward()
                            total += loss.detach() / world
        ep.reduce_gradients()
        norm = ep.clip_grad_norm_(1.0)
        optimizer.step()
        dist.all_reduce(total)
        losses.append(float(total))
        line = ep.stats_line()
        for _name, _tensor in ep.named_logical_parameters():  # what a rollout engine would be given
            pass
        if args.checkpoints:
            ep.save_checkpoint(args.checkpoints / str(step), optimizer)
        if rank == 0:
            print(f"step {step}: loss {losses[-1]:.4f}, gradient norm {float(norm):.3f}", flush=True)
            print(line, flush=True)
    return losses


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--nodes", type=int, default=1, help="over which an expert-parallel group is spread")
    parser.add_argument("--copies", type=int, default=1, help="of all experts: expert-parallel groups")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--checkpoints", type=Path, help="folder; the last one in it is resumed")
    return parser.parse_args(words)


def main() -> None:
    args = arguments()
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    train(args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
