"""Hugging Face models over ranks through `DistributedConfig`: what a rank does, and one process beside it."""

import dataclasses
import os
import tempfile
from contextlib import ExitStack

import numpy as np
import torch
import torch.distributed as dist
from hf_families import make_model, make_tokens

from relibra_kernels.planner import BatchPlan, PlanOptions, RoutingTrace

SEQUENCES, LENGTH = 8, 9  # a rank has every other sequence, in two micro-batches
MICRO_BATCHES = 2


def micro_batches_of(rank: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """This rank's sequences, and the micro-batch of each."""
    mine = np.arange(SEQUENCES)[rank::ranks]
    return mine, np.arange(len(mine)) * MICRO_BATCHES // len(mine)


def all_tokens() -> torch.Tensor:
    return make_tokens(SEQUENCES, LENGTH)


def load(family: str, ranks: int) -> torch.nn.Module:
    """The model over the ranks, by `from_pretrained`, of a checkpoint that rank 0 wrote."""
    from transformers.distributed import DistributedConfig

    import relibra_kernels.integrations.transformers  # noqa: F401

    rank, model = dist.get_rank(), make_model(family)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    config = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="relibra")
    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders)
        if rank == 0:
            model.save_pretrained(own)
        dist.barrier()
        loaded = type(model).from_pretrained(folders[0], distributed_config=config, attn_implementation="eager")
        dist.barrier()  # before the folder goes
    return loaded


def step(model: torch.nn.Module, contexts, tokens: torch.Tensor, groups: np.ndarray) -> torch.Tensor:
    """Forward and backward of every micro-batch; logits [sequences, N, V]. `contexts(m)` are open around each."""
    logits = []
    for m in range(MICRO_BATCHES):
        part = tokens[groups == m]
        with ExitStack() as stack:
            for context in contexts(m):
                stack.enter_context(context)
            out = model(part, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            (loss / SEQUENCES).backward()
        logits.append(out.detach())
    return torch.cat(logits)


def one_process(family: str, trace: RoutingTrace | None = None) -> dict:
    """What the ranks together must give: logits and gradients (FSDP divides by the ranks, `results` undoes it)."""
    from relibra_kernels.integrations.transformers import record_routing, replay

    model, tokens = make_model(family), all_tokens()
    with ExitStack() as stack:
        record = stack.enter_context(record_routing(model))
        if trace is not None:
            stack.enter_context(replay(model, trace, on_shift="ignore"))
        logits = model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        (loss / SEQUENCES).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits.detach(), "gradients": gradients, "trace": record.trace(tokens.tolist())}


def run_on_rank(
    family: str,
    ranks: int,
    mode: str,
    trace: RoutingTrace | None,
    plan: BatchPlan | None,
    gpus_per_node: int | None = None,
    transport: str = "auto",
) -> dict:
    """`mode`: "live" (no batch), "replay" (no batch), "plan" (batch without a trace), "plan and trace"."""
    from relibra_kernels.integrations import transformers as ours
    from relibra_kernels.integrations.transformers.expert_parallel import implementations_of

    model = load(family, ranks)
    mine, groups = micro_batches_of(dist.get_rank(), ranks)
    tokens = all_tokens()[mine]
    own = None if trace is None else trace.select(mine)
    comm = ours.communication(model)
    comm.bytes_sent.clear()

    def contexts(m):
        found = [] if mode in ("live", "replay") else [ours.micro_batch(m)]
        if mode == "replay":
            found.append(ours.replay(model, own.select(np.flatnonzero(groups == m)), on_shift="ignore"))
        return found

    with ExitStack() as stack:
        if mode == "plan":
            stack.enter_context(ours.batch(model, plan, transport=transport))
        if mode == "plan and trace":
            if plan is None:
                how = {"gpus_per_node": gpus_per_node, "transport": transport, "options": PlanOptions(balance=1.0)}
                plan = ours.plan(model, own, groups, MICRO_BATCHES, **how)
            stack.enter_context(ours.batch(model, plan, own, groups, transport=transport))
        runner = implementations_of(model)[0].runner
        logits = step(model, contexts, tokens, groups)
    gradients = {name: p.grad.full_tensor() * ranks for name, p in model.named_parameters() if p.grad is not None}
    return {
        "logits": logits.numpy(),
        "gradients": {name: gradient.numpy() for name, gradient in gradients.items()},
        "bytes": dict(comm.bytes_sent),
        "hops": None if runner is None else runner.live._transport.name,
        "replicas": 0 if plan is None else int((plan.replicas >= 0).sum()),
    }


def refusals(family: str, ranks: int, trace: RoutingTrace, plan: BatchPlan) -> list[str]:
    """The messages of what must be refused, in the order tried."""
    from relibra_kernels.integrations import transformers as ours
    from relibra_kernels.planner.errors import ReLibraError

    model = load(family, ranks)
    mine, groups = micro_batches_of(dist.get_rank(), ranks)
    own = trace.select(mine)
    moved = plan.home.copy()
    moved[1, [0, -1]] = moved[1, [-1, 0]]
    empty = dataclasses.replace(plan, replicas=plan.replicas * 0 - 1, quota=plan.quota * 0)
    reordered = dataclasses.replace(empty, home=moved)
    messages = []

    def attempt(function):
        try:
            function()
            messages.append("")
        except ReLibraError as error:
            messages.append(str(error))

    def enter(*arguments):
        with ours.batch(*arguments):
            pass

    def outside():
        with ours.batch(model, empty):
            model(all_tokens()[mine])

    def other_tokens():
        with ours.batch(model, plan, own, groups), ours.micro_batch(0):
            model(all_tokens()[mine])  # both micro-batches at once

    attempt(lambda: enter(model, reordered))
    attempt(lambda: enter(model, plan, own, groups[::-1].copy()))
    attempt(lambda: enter(model, plan, own))
    attempt(lambda: enter(torch.nn.Linear(2, 2), plan))
    attempt(outside)
    attempt(other_tokens)
    attempt(lambda: ours.micro_batch(0).__enter__())
    return messages


def shifted(family: str, ranks: int, trace: RoutingTrace, on_shift: str) -> str:
    """What a batch says whose record the model would not choose: "" where it trains on it."""
    from relibra_kernels.integrations import transformers as ours
    from relibra_kernels.planner.errors import ReLibraError

    model = load(family, ranks)
    mine, groups = micro_batches_of(dist.get_rank(), ranks)
    own = trace.select(mine)
    plan = ours.plan(model, own, groups, MICRO_BATCHES)
    try:
        with ours.batch(model, plan, own, groups, on_shift=on_shift):
            step(model, lambda m: [ours.micro_batch(m)], all_tokens()[mine], groups)
    except ReLibraError as error:
        return str(error)
    return ""
