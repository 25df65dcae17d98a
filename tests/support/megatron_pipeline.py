"""A GPT of megatron-core cut into pipeline stages, whole or virtual, trained by Megatron's own 1F1B schedules."""

import numpy as np
import torch
import torch.distributed as dist
from hf_under_plan import moving_plan
from megatron_ranks import example
from torch import Tensor

from relibra_kernels import RoutedBatch, RoutingTrace
from relibra_kernels.planner.errors import InputError

LAYERS, STAGES, MICRO_BATCHES, STEPS = 4, 2, 4, 2
OPTIONS = {"num_layers": LAYERS, "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}


def rollouts(step: int) -> tuple[Tensor, RoutingTrace]:
    """Tokens, and routing of all four layers."""
    tokens, trace = example().rollouts(step)
    ids = np.concatenate([trace.expert_ids, np.roll(trace.expert_ids, 1, 2)[:, ::-1]], 1)
    return tokens, RoutingTrace(ids, trace.offsets, trace.num_experts, range(LAYERS))


def inputs(part: Tensor) -> dict[str, Tensor]:
    length = part.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    positions = torch.arange(length).expand_as(part)
    return {"input_ids": part, "position_ids": positions, "attention_mask": mask, "labels": part.roll(-1, 1)}


def alone() -> tuple[dict[str, Tensor], list[float], dict[str, Tensor]]:
    """The first parameters, the losses, and the parameters after all steps. On one rank."""
    module = example()
    model = module.make_model(**OPTIONS)
    ep = module.expert_parallel(model, gpus_per_node=1)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens, trace = rollouts(step)
        batch = RoutedBatch(trace, np.zeros(len(tokens), int), 1)
        with ep.batch(ep.plan(batch), batch, optimizer), ep.micro_batch(0, module.rows_sequence_first(len(tokens))):
            loss = model(**inputs(tokens))[:, :-1].mean()
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return first, losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def stage(chunks: int) -> tuple[list, dict[str, str]]:
    """The chunks of this rank's stage, and the name in the whole model of each of their parameters."""
    module, state = example(), example().parallel_state
    state.destroy_model_parallel()
    state.initialize_model_parallel(
        pipeline_model_parallel_size=STAGES,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        expert_model_parallel_size=2,
    )
    config = module.config_of(
        **OPTIONS,
        pipeline_model_parallel_size=STAGES,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        pipeline_dtype=torch.float32,
        overlap_p2p_comm=chunks > 1,  # else two virtual stages of two ranks mix up what they send each other
        batch_p2p_comm=chunks == 1,
    )
    here, models, names = state.get_pipeline_model_parallel_rank(), [], {}
    for chunk in range(chunks):
        spec = module.get_gpt_layer_local_spec(num_experts=module.EXPERTS, moe_grouped_gemm=False)
        model = module.GPTModel(
            config,
            module.with_relibra_experts(spec),
            module.VOCABULARY,
            module.LENGTH,
            pre_process=here == 0 and chunk == 0,
            post_process=here == STAGES - 1 and chunk == chunks - 1,
            position_embedding_type="rope",
            vp_stage=chunk if chunks > 1 else None,
        )
        for name, _ in model.named_parameters():
            path = name.split(".")
            if path[:2] == ["decoder", "layers"]:
                path[2] = str(model.decoder.layers[int(path[2])].layer_number - 1)
            names[f"{chunk}.{name}"] = ".".join(path)
        models.append(model)
    return models, names


def is_open(ep) -> bool:
    try:
        with ep.micro_batch(0):
            return True
    except InputError:
        return False


def together(first: dict[str, Tensor], chunks: int) -> tuple[list[float], dict[str, Tensor], tuple[int, ...]]:
    """Losses (of the last stage), this stage's parameters in logical order, and its layers. On four ranks."""
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from relibra_kernels.integrations.megatron_moe import layer_ids
    from relibra_kernels.integrations.megatron_schedule import batch_in_schedule

    module, state = example(), example().parallel_state
    models, names = stage(chunks)
    ep = module.expert_parallel(models, gpus_per_node=2)
    layers = layer_ids(models)
    whole = torch.nn.ModuleList(models)
    experts = {id(p) for p in ep.expert_parameters()}
    rank, mine = ep.comm.rank, slice(4 * ep.comm.rank, 4 * ep.comm.rank + 4)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            source = first[names[name]]
            parameter.copy_(source[mine] if id(parameter) in experts else source)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens, trace = rollouts(step)
        own = np.arange(len(tokens))[rank::2]
        groups = np.arange(len(own)) * MICRO_BATCHES // len(own)
        parts = [tokens[own[groups == m]] for m in range(MICRO_BATCHES)]
        rows = [module.rows_sequence_first(len(part)) for part in parts]
        batch = RoutedBatch(trace.slice_layers(layers).select(own), groups, MICRO_BATCHES, rows)
        fed, seen = {id(model): iter(parts) for model in models}, []
        closed: list[bool] = []

        def forward_step(_, model, fed=fed, seen=seen):
            out = model(**inputs(part := next(fed[id(model)])))

            def loss_of(losses):
                loss = losses[:, :-1].sum() / (module.SEQUENCES * (part.shape[1] - 1))
                seen.append(loss.detach())
                return loss * MICRO_BATCHES, {}  # Megatron divides by them

            return out, loss_of

        def reduce_gradients(*_, closed=closed, **__):
            """Of the dense parameters; after the batch, whose replicas return gradients of experts until it closes."""
            for parameter in ep.dense_parameters():
                dist.all_reduce(parameter.grad, group=state.get_data_parallel_group())
            closed.append(not is_open(ep))

        for model in models:
            model.config.finalize_model_grads_func = reduce_gradients
        plan = moving_plan(ep.gather_loads(batch), step + 1)
        run = get_forward_backward_func()
        with batch_in_schedule(ep, plan, batch, optimizer, model=models):
            run(
                forward_step_func=forward_step,
                data_iterator=[None] * chunks if chunks > 1 else None,
                model=models if chunks > 1 else models[0],
                num_microbatches=MICRO_BATCHES,
                seq_length=module.LENGTH,
                micro_batch_size=len(own) // MICRO_BATCHES,
                forward_only=False,
            )
        assert closed == [True] and "forward" not in vars(models[0])
        assert models[0].config.finalize_model_grads_func is reduce_gradients
        total = sum(seen, torch.zeros(()))
        dist.all_reduce(total, group=state.get_data_parallel_group())
        losses.append(float(total))
        optimizer.step()
    assert ep.stats().replicas
    parameters = {names[name]: tensor for name, tensor in ep.named_logical_parameters()}
    return losses, parameters, layers
