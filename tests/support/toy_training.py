"""A toy MoE language model and its training, in one process and expert-parallel: what parity tests compare.

Tokens do not attend to each other, so a sequence's loss depends on its own tokens alone.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy_plans import shuffled_plan

from relibra_kernels.nn import ExpertForm, ReplicatedExperts, ReplicatedMoE, TopKRouter, replay_routing
from relibra_kernels.parallel import ExpertParallel, RoutedBatch, RuntimeOptions
from relibra_kernels.planner import BatchPlan, ClusterSpec, PlanOptions, RoutingTrace, plan_batch, static_plan

QWEN = ExpertForm()


@dataclass(frozen=True)
class Case:
    """What to train: sizes, cluster, and how the tokens are routed."""

    ranks: int = 2
    gpus_per_node: int = 2
    replica_slots: int = 2
    layers: int = 2
    experts: int = 8
    top_k: int = 2
    hidden: int = 16
    intermediate: int = 24
    micro_batches: int = 2
    sequence_lengths: tuple[int, ...] = (5, 9, 3, 7, 6, 4, 8, 5)  # sequence i: rank i % ranks
    routing: str = "skewed"  # skewed | same (every token the same experts) | empty_expert (expert 0 never)
    # planned | static | shuffled (random homes, kept replicas) | fetched (random homes, none kept) | mixed (shuffled,
    # none kept in layer 0)
    plan: str = "planned"
    steps: int = 1
    dtype: torch.dtype = torch.float64
    padding: int = 0  # padding tokens before every sequence
    form: ExpertForm = QWEN
    main_grad: bool = False
    recompute: bool = False
    shared_experts: bool = False
    output_dtype: torch.dtype | None = None  # of the output layer, where it differs
    frozen: tuple[str, ...] = ()  # parameters whose names end so
    scoring: str = "softmax"
    unrecorded: float = 0.0  # fraction of tokens, beside the last ones, that are routed live
    checkpoint: str = ""  # "reentrant" | "non-reentrant": every block computes its activations again
    # when backward runs: each | after (outside of the context) | thread | one_ahead | together | split (gradients of
    # inputs alone before)
    order: str = "each"
    passes_before: int = 0  # passes over all micro-batches without gradients
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    optimizer: str = "adamw"  # | momentum
    learning_rate: float = 1e-2
    seed: int = 0


class ToyModel(nn.Module):
    """Embedding, MoE layers with residuals, output layer: token ids [T] -> logits [T, vocabulary]."""

    def __init__(self, case: Case, vocabulary: int = 32):
        super().__init__()
        torch.manual_seed(case.seed)
        self.checkpoint = case.checkpoint
        self.embedding = nn.Embedding(vocabulary, case.hidden)
        self.moe = nn.ModuleList(
            ReplicatedMoE(
                TopKRouter(case.hidden, case.experts, case.top_k, scoring=case.scoring),
                ReplicatedExperts(
                    case.experts, case.hidden, case.intermediate, form=case.form, recompute=case.recompute
                ),
                nn.Linear(case.hidden, case.hidden) if case.shared_experts else None,
            )
            for _ in range(case.layers)
        )
        self.output = nn.Linear(case.hidden, vocabulary)
        for moe in self.moe:
            moe.experts.reset_parameters(std=0.3)
        self.to(case.dtype)
        self.output.to(case.output_dtype or case.dtype)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.endswith(case.frozen) if case.frozen else True)

    @staticmethod
    def _block(moe: nn.Module, x_TH: torch.Tensor) -> torch.Tensor:
        out_TH = x_TH + moe(x_TH)
        return nn.functional.rms_norm(out_TH, out_TH.shape[-1:])  # saves an activation made after the experts

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        x_TH = self.embedding(tokens_T)
        for moe in self.moe:
            if self.checkpoint:
                reentrant = self.checkpoint == "reentrant"
                x_TH = checkpoint(self._block, moe, x_TH, use_reentrant=reentrant, preserve_rng_state=False)
            else:
                x_TH = self._block(moe, x_TH)
        return self.output(x_TH.to(self.output.weight.dtype))


def make_batch(case: Case, step: int) -> tuple[RoutingTrace, np.ndarray, list[np.ndarray]]:
    """The recorded routing of all sequences, their micro-batches, and their token ids."""
    random = np.random.default_rng([case.seed, step])
    popularity = random.lognormal(0, 1.5, (case.layers, case.experts))
    ids = np.full((sum(case.sequence_lengths), case.layers, case.top_k), -1, np.int8)
    offsets = np.concatenate([[0], np.cumsum(case.sequence_lengths)])
    last = set((offsets[1:] - 1).tolist())
    for token in range(len(ids)):
        if token in last or random.random() < case.unrecorded:
            continue
        for layer in range(case.layers):
            p = popularity[layer].copy()
            if case.routing == "empty_expert":
                p[0] = 0
            chosen = random.choice(case.experts, case.top_k, replace=False, p=p / p.sum())
            ids[token, layer] = range(case.top_k) if case.routing == "same" else chosen
    trace = RoutingTrace(ids, offsets, case.experts, tuple(range(case.layers)))
    groups = np.arange(len(case.sequence_lengths)) // case.ranks % case.micro_batches
    return trace, groups, [random.integers(0, 32, n) for n in case.sequence_lengths]


def loss_sum(logits_TV: torch.Tensor, tokens_T: torch.Tensor, counted_T: torch.Tensor) -> torch.Tensor:
    """Cross entropy against the token itself plus one, over the counted tokens."""
    losses = nn.functional.cross_entropy(logits_TV.double(), (tokens_T + 1) % 32, reduction="none")
    return losses[counted_T].sum()


def make_optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with an eps above the rounding of fp32: the gradient of a router's row whose expert no token chose is zero
    but for rounding, which a smaller eps would turn into whole steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if case.optimizer == "momentum":
        return torch.optim.SGD(trained, lr=case.learning_rate, momentum=0.9)
    return torch.optim.AdamW(trained, lr=case.learning_rate, eps=1e-6)


def not_last(trace: RoutingTrace) -> torch.Tensor:
    """bool [tokens]: all but the last of every sequence."""
    counted = torch.ones(trace.num_tokens, dtype=torch.bool)
    ends = trace.offsets[1:][np.diff(trace.offsets) > 0]
    counted[torch.from_numpy(ends - 1)] = False
    return counted


def train_alone(
    case: Case, max_norm: float = float("inf")
) -> tuple[list[float], list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """One process: losses, gradients of each step before they are clipped, final parameters."""
    model = ToyModel(replace(case, checkpoint=""))
    optimizer = make_optimizer(case, model)
    losses, gradients = [], []
    for step in range(case.steps):
        trace, groups, tokens = make_batch(case, step)
        optimizer.zero_grad()
        total = 0.0
        for m in range(case.micro_batches):
            chosen = np.flatnonzero(groups == m)
            part = trace.select(chosen)
            ids = torch.from_numpy(np.concatenate([tokens[i] for i in chosen]))
            with replay_routing([moe.router for moe in model.moe], torch.from_numpy(part.expert_ids)):
                loss = loss_sum(model(ids), ids, not_last(part)) / trace.num_tokens
                loss.backward()
            total += loss.item()
        losses.append(total)
        gradients.append({n: p.grad.double().numpy().copy() for n, p in model.named_parameters() if p.grad is not None})
        if max_norm < float("inf"):
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        optimizer.step()
    return losses, gradients, {name: p.detach().double().numpy() for name, p in model.named_parameters()}


def start(case: Case) -> tuple[ExpertParallel, torch.optim.Optimizer]:
    """The model on the default group, and its optimizer."""
    cluster = ClusterSpec(case.ranks // case.gpus_per_node, case.gpus_per_node, case.replica_slots)
    ep = ExpertParallel(ToyModel(case), cluster, model_name="toy", options=case.options)
    return ep, make_optimizer(case, ep.model)


def train_parallel(case: Case) -> dict[str, object]:
    """On every rank of the default group: the same as `train_alone`, plus what was used on the way."""
    return train_steps(case, *start(case), range(case.steps))


def train_steps(case: Case, ep: ExpertParallel, optimizer: torch.optim.Optimizer, steps: range) -> dict[str, object]:
    """Some of the case's steps."""
    rank = dist.get_rank()
    losses, gradients, replicas, moved = [], [], 0, 0
    for step in steps:
        trace, groups, tokens = make_batch(case, step)
        mine = np.arange(rank, trace.num_sequences, case.ranks)
        everyone = RoutedBatch(
            trace,
            groups,
            case.micro_batches,
            rank_of_sequence=np.arange(len(groups)) % case.ranks,
            num_ranks=case.ranks,
        )
        my_trace, my_groups = trace.select(mine), groups[mine]
        plan = make_plan(case, ep, everyone, step)
        replicas += int((plan.replicas >= 0).sum())
        moved += int((plan.home != ep.home).sum())
        optimizer.zero_grad()
        if case.main_grad:
            for moe in ep.layers:
                for parameter in (moe.experts.gate_up_proj, moe.experts.down_proj):
                    if parameter.requires_grad:
                        parameter.main_grad = torch.zeros_like(parameter)

        inputs = [
            model_input(case, my_trace, tokens, mine, np.flatnonzero(my_groups == m)) for m in range(case.micro_batches)
        ]
        forward = partial(forward_once, case, ep, inputs, trace.num_tokens)
        with ep.batch(plan, everyone, optimizer):
            with torch.no_grad():
                before = [forward(m).item() for _ in range(case.passes_before) for m in range(case.micro_batches)]
            total = sum(forward_backward(case, forward, ep.model.embedding.weight))
        assert all(abs(sum(before) - case.passes_before * total) < 1e-5 for _ in before)
        if case.main_grad:
            for moe in ep.layers:
                for parameter in (moe.experts.gate_up_proj, moe.experts.down_proj):
                    assert parameter.grad is None
                    parameter.grad = parameter.__dict__.pop("main_grad", None)
        ep.reduce_gradients()
        total_loss = torch.tensor(total, dtype=torch.float64)
        dist.all_reduce(total_loss)
        losses.append(total_loss.item())
        named = ep.named_logical_parameters(lambda p: p.grad)
        gradients.append({name: grad.double().numpy().copy() for name, grad in named if grad is not None})
        optimizer.step()
    parameters = {name: value.double().numpy().copy() for name, value in ep.named_logical_parameters()}
    return {
        "losses": losses,
        "gradients": gradients,
        "parameters": parameters,
        "replicas": replicas,
        "moved": moved,
        "bytes": dict(ep.comm.bytes_sent),
    }


def forward_once(case: Case, ep: ExpertParallel, inputs: list[tuple], total: int, m: int) -> torch.Tensor:
    """The loss of one micro-batch, with its backward where that runs within."""
    ids, rows, counted = inputs[m]
    with ep.micro_batch(m, rows):
        loss = loss_sum(ep.model(ids), ids, counted) / total
        if case.order == "each" and torch.is_grad_enabled():
            loss.backward()
    return loss


def forward_backward(case: Case, forward: Callable[[int], torch.Tensor], inputs: torch.Tensor) -> list[float]:
    """Losses of the micro-batches, whose backward runs in the case's order.

    Args:
        inputs: what gradients are asked for alone, where backward is split.
    """
    losses, waiting = [], []
    for m in range(case.micro_batches):
        loss = forward(m)
        losses.append(loss.item())
        if case.order == "after":
            loss.backward()
        elif case.order == "split":
            torch.autograd.grad(loss, [inputs], retain_graph=True)
            loss.backward()
        elif case.order == "thread":
            with ThreadPoolExecutor(1) as elsewhere:
                elsewhere.submit(loss.backward).result()
        elif case.order in ("one_ahead", "together"):
            waiting.append(loss)
            if case.order == "one_ahead" and len(waiting) == 2:
                waiting.pop(0).backward()
    if case.order == "together":
        sum(waiting).backward()
    elif waiting:
        waiting.pop().backward()
    return losses


def model_input(
    case: Case, trace: RoutingTrace, tokens: list[np.ndarray], mine: np.ndarray, chosen: np.ndarray
) -> tuple[torch.Tensor, np.ndarray | None, torch.Tensor]:
    """(token ids, trace row of each, which count in the loss) of this rank's `chosen` sequences, padded in front."""
    ids: list[int] = []
    rows: list[int] = []
    row = 0
    for i in chosen:
        ids += [0] * case.padding + tokens[mine[i]].tolist()
        rows += [-1] * case.padding + list(range(row, row := row + len(trace.sequence(i))))
    counted = torch.cat([not_last(trace.select(chosen)), torch.tensor([False])])[np.array(rows, np.int64)]
    return torch.tensor(ids, dtype=torch.int64), np.array(rows, np.int64) if case.padding else None, counted


def make_plan(case: Case, ep: ExpertParallel, batch: RoutedBatch, step: int) -> BatchPlan:
    loads = ep.gather_loads(batch)
    if case.plan == "planned":
        # Memory for one copy a rank, so that replicas are kept and fetched, from homes at random, so that experts move.
        random = np.random.default_rng(step)
        home = np.stack([random.permutation(np.arange(case.experts) % case.ranks) for _ in range(case.layers)])
        one = PlanOptions().shape.copy_bytes
        options = PlanOptions(balance=1.0, kept_bytes=one, max_moves=0)
        return plan_batch(loads, ep.cluster, previous_home=home, model="toy", options=options)
    if case.plan == "static":
        return static_plan(loads, ep.cluster, "toy")
    plan = shuffled_plan(loads, ep.cluster, step, keep=case.plan != "fetched")
    if case.plan in ("shuffled", "uneven", "fetched"):
        return plan
    fetched, first = shuffled_plan(loads, ep.cluster, step, keep=False), np.arange(case.layers) == 0
    replicas, quota = (
        np.where(first[:, None, None, None], getattr(fetched, name), getattr(plan, name))
        for name in ("replicas", "quota")
    )
    return replace(plan, replicas=replicas, quota=quota, kept=plan.kept & ~first[:, None, None], loads=loads)
