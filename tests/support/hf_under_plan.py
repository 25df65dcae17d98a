"""A Hugging Face family trained by ranks under plans that move and copy experts, against one process that replays."""

import numpy as np
import torch
import torch.distributed as dist
from hf_all_families import VOCABULARY, tiny_model
from torch import Tensor, nn

from relibra_kernels import BatchPlan, ClusterSpec, ExpertParallel, RoutingTrace
from relibra_kernels.planner import count_loads

LOOKS_BOTH_WAYS = ("openai_privacy_filter",)  # the last token matters to those before it
# Compared in float64, to 1e-10: transformers' own float32 gradients of these are further than 1e-5 from float64's
# (1.6e-5 of the Gemmas; hyper-connections amplify rounding to 1.7e-4 and 4.5e-2).
IN_FLOAT64 = ("deepseek_v4", "diffusion_gemma", "gemma4", "glm5_next", "hy_v4", "hy_v4_vl")
SEQUENCES, LENGTH, MICRO_BATCHES, STEPS = 8, 7, 2, 2


def make_tokens(step: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(step))


def random_trace(
    num_layers: int, layer_ids: tuple[int, ...], num_experts: int, top_k: int, step: int, whole: bool = False
) -> RoutingTrace:
    """Routing that the model would not choose, skewed; every sequence's last token unknown, unless it is `whole`."""
    random = np.random.default_rng(step)
    scores = random.random((SEQUENCES * LENGTH, num_layers, num_experts)) * (1 + np.arange(num_experts)[::-1])
    ids = scores.argsort(-1)[..., ::-1][..., :top_k].astype(np.int16)
    if not whole:
        ids[LENGTH - 1 :: LENGTH] = -1
    return RoutingTrace(ids, np.arange(SEQUENCES + 1) * LENGTH, num_experts, layer_ids)


def moving_plan(loads_LMRE: np.ndarray, shift: int) -> BatchPlan:
    """Every expert `shift` ranks on from its first home; every rank copies its busiest foreign one for a part."""
    layers, micro_batches, ranks, experts = loads_LMRE.shape
    home = np.tile((np.arange(experts) // (experts // ranks) + shift) % ranks, (layers, 1)).astype(np.int32)
    home[:, [0, -1]] = home[:, [-1, 0]]
    replicas = np.full((layers, micro_batches, ranks, 1), -1, np.int32)
    quota = np.zeros_like(replicas)
    for layer, m, rank in np.ndindex(layers, micro_batches, ranks):
        load = np.where(home[layer] != rank, loads_LMRE[layer, m].sum(0), -1)
        if load.max() < 2:  # one rank has no foreign expert
            continue
        replicas[layer, m, rank, 0], quota[layer, m, rank, 0] = load.argmax(), load.max() // ranks
    kept = np.zeros((layers, ranks, 1), bool)
    return BatchPlan(home, replicas, quota, kept, ranks, loads=loads_LMRE)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    out = model(tokens, use_cache=False)
    logits = out.logits if hasattr(out, "logits") else out.last_hidden_state  # some have no text-only head
    wanted = tokens[:, 1:].flatten() % logits.shape[-1]
    auxiliary = getattr(out, "aux_loss", None)  # with output_router_logits
    of_routers = 0.0 if auxiliary is None else 0.1 * auxiliary
    return of_routers + nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted, reduction="sum") / (
        SEQUENCES * LENGTH
    )


def prepared(family: str, **options) -> nn.Module:
    model = tiny_model(family, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[0].endswith("experts") or name.endswith(("gate.weight", "router.weight")):
                parameter.normal_(std=0.2)
        for name, table in model.named_buffers():
            if name.endswith("tid2eid"):  # the experts of every token id, all zeros until a checkpoint is loaded
                top_k, experts = table.shape[1], model.config.n_routed_experts
                table.copy_(torch.rand(len(table), experts).argsort(1)[:, :top_k])
    return model.double() if family in IN_FLOAT64 else model


def micro_batches_of(rank: int, ranks: int) -> list[np.ndarray]:
    """The sequences of each micro-batch of a rank, which has every `ranks`-th."""
    return np.array_split(np.arange(SEQUENCES)[rank::ranks], MICRO_BATCHES)


def alone(family: str, ranks: int, **options) -> tuple[list[RoutingTrace], list[tuple[float, dict[str, Tensor]]]]:
    """The traces of all steps, and loss and gradients of each, by transformers' own experts and our replay.

    In the micro-batches of the ranks: what a family sums in float32 depends on which tokens run together, and
    hyper-connections amplify that (HY-V4's own gradients of whole and of divided batches differ by 3e-3 in float64).
    """
    from relibra_kernels.integrations.transformers import replay
    from relibra_kernels.integrations.transformers.moe_layers import moe_layers

    model = prepared(family, **options)
    layers = moe_layers(model)
    shape = (len(layers), tuple(layer.layer_id for layer in layers), layers[0].num_experts, layers[0].top_k)
    whole = family in LOOKS_BOTH_WAYS or "output_router_logits" in options  # that loss is of every token
    traces = [random_trace(*shape, step, whole) for step in range(STEPS)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    results = []
    for step, trace in enumerate(traces):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for sequences in (part for rank in range(ranks) for part in micro_batches_of(rank, ranks)):
            with replay(model, trace.select(sequences), on_shift="ignore"):
                loss = loss_of(model, make_tokens(step)[sequences])
                loss.backward()
            total += loss.detach()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((total.item(), gradients))
        optimizer.step()
    return traces, results


def together(family: str, traces: list[RoutingTrace], options: dict) -> list[tuple[float, dict[str, Tensor]]]:
    """The same on ranks, each with every other sequence. Runs on every rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = prepared(family, **options)
    ep = ExpertParallel(model, ClusterSpec(1, ranks, replica_slots=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    parts = micro_batches_of(rank, ranks)
    mine, groups = np.concatenate(parts), np.repeat(np.arange(MICRO_BATCHES), [len(part) for part in parts])
    results = []
    for step, whole in enumerate(traces):
        optimizer.zero_grad()
        trace, tokens = whole.select(mine), make_tokens(step)[mine]
        plan = moving_plan(ep.gather_loads(trace, groups, MICRO_BATCHES), step + 1)
        total = torch.zeros((), dtype=torch.float64)
        with ep.batch(plan, trace, groups, optimizer):
            for m in range(MICRO_BATCHES):
                with ep.micro_batch(m):
                    loss = loss_of(model, tokens[groups == m])
                    loss.backward()
                total += loss.detach()
        ep.reduce_gradients()
        dist.all_reduce(total)
        gradients = {name: g.clone() for name, g in ep.named_logical_parameters(lambda p: p.grad) if g is not None}
        results.append((total.item(), gradients if rank == 0 else {}))
        optimizer.step()
    assert (plan.replicas >= 0).any() and count_loads(trace, groups, MICRO_BATCHES).any()
    return results


def compare(family: str, ranks, **options) -> str:
    """Empty, or what differs: loss, or a gradient, by more than 1e-5 relative, or 1e-10 in float64."""
    bound = 1e-10 if family in IN_FLOAT64 else 1e-5
    traces, expected = alone(family, ranks.size, **options)
    got = ranks.run(together, family, traces, options)[0]
    for step, ((loss, gradients), (wanted_loss, wanted)) in enumerate(zip(got, expected, strict=True)):
        if abs(loss - wanted_loss) > bound * abs(wanted_loss):
            return f"step {step}: loss {loss}, not {wanted_loss}"
        if gradients.keys() != wanted.keys():
            return f"step {step}: gradients of {sorted(gradients.keys() ^ wanted.keys())[:3]} on one side only"
        for name, gradient in wanted.items():
            error = (gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
            if not error <= bound:
                return f"step {step}: the gradient of {name} differs by {error:.1e}"
    return ""


def kernels_against_eager(family: str) -> float:
    """The largest relative difference of a gradient, in float64, on one process that replays."""
    from relibra_kernels.integrations.transformers import replay
    from relibra_kernels.integrations.transformers.moe_layers import moe_layers

    gradients = []
    for implementation in ("eager", "relibra"):
        model = prepared(family).double()
        model.set_experts_implementation(implementation)
        layers = moe_layers(model)
        ids = tuple(layer.layer_id for layer in layers)
        trace = random_trace(len(layers), ids, layers[0].num_experts, layers[0].top_k, 0)
        with replay(model, trace, on_shift="ignore"):
            loss_of(model, make_tokens(0)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected, got = gradients
    assert expected.keys() == got.keys()
    return max(float((got[name] - g).norm() / g.norm().clamp_min(1e-12)) for name, g in expected.items())


def recorded_and_replayed(family: str) -> tuple[float, int, int]:
    """What a forward recorded, replayed, a shift refused: (relative error of the loss, sequences, unknown tokens)."""
    from relibra_kernels.integrations.transformers import record_routing, replay

    model, tokens = prepared(family), make_tokens(0)
    with torch.no_grad():
        with record_routing(model) as record:
            expected = loss_of(model, tokens)
        trace = record.trace()
        with replay(model, trace, on_shift="refuse"):
            got = loss_of(model, tokens)
    return float((got - expected).abs() / expected.abs()), trace.num_sequences, int(trace.unknown.sum())


def replayed_choices(family: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids that routing at random names, ids that the experts were given under its replay), [tokens, L, K], sorted."""
    from relibra_kernels.integrations.transformers import replay
    from relibra_kernels.integrations.transformers.moe_layers import moe_layers

    model = prepared(family)
    layers = moe_layers(model)
    shape = (len(layers), tuple(layer.layer_id for layer in layers), layers[0].num_experts, layers[0].top_k)
    trace, given = random_trace(*shape, 0, whole=True), []
    for layer in layers:
        layer.experts.register_forward_pre_hook(lambda _, args: given.append(args[1].numpy()))
    with torch.no_grad(), replay(model, trace, on_shift="ignore"):
        loss_of(model, make_tokens(0))
    return np.sort(trace.expert_ids), np.sort(np.stack(given, 1))
