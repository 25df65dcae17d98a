"""What the expert-parallel runtime must refuse, run on every rank of a group."""

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toy_plans import shuffled_plan
from toy_training import Case, ToyModel, loss_sum, make_batch

from relibra_kernels.parallel import ExpertParallel, RuntimeOptions
from relibra_kernels.planner import ClusterSpec, PlanOptions, ReLibraError, RoutingTrace

CASE = Case(layers=3)


def refusal(name: str) -> tuple[str, str, bool]:
    """(type of the error, its message, whether any expert weight changed or moved) of one bad input."""
    cluster = ClusterSpec(1, CASE.ranks, CASE.replica_slots)
    rank = dist.get_rank()
    ep = ExpertParallel(ToyModel(CASE), cluster, model_name="toy")
    experts = ep.layers[0].experts
    before, home = experts.gate_up_proj.detach().clone(), ep.home.copy()
    trace, groups, tokens = make_batch(CASE, 0)
    mine = np.arange(rank, trace.num_sequences, CASE.ranks)
    trace, groups = trace.select(mine), groups[mine]
    loads = ep.gather_loads(trace, groups, CASE.micro_batches)
    plan = shuffled_plan(loads, cluster, 0)
    optimizer = torch.optim.SGD(ep.model.parameters(), lr=0.1)
    ids = torch.from_numpy(np.concatenate([tokens[mine[i]] for i in np.flatnonzero(groups == 0)]))

    def train(plan=plan, trace=trace, groups=groups, ids=ids, rows=None, index=0):
        with ep.batch(plan, trace, groups, optimizer), ep.micro_batch(index, rows):
            loss_sum(ep.model(ids), ids, torch.ones(len(ids), dtype=torch.bool)).backward()

    def another_model():
        train(plan=replace(plan, model="other"))

    def other_loads():
        train(trace=trace.select(np.arange(trace.num_sequences)[::-1]))

    def other_cluster():
        train(plan=shuffled_plan(loads, ClusterSpec(CASE.ranks, 1, 1), 0))

    def other_plan_on_one_rank():
        train(plan=shuffled_plan(loads, cluster, rank))

    def unknown_in_the_middle():
        gap = trace.expert_ids.copy()
        gap[0] = -1
        train(trace=RoutingTrace(gap, trace.offsets, trace.num_experts, trace.moe_layer_ids))

    def other_layers():
        train(trace=RoutingTrace(trace.expert_ids[:, :2].copy(), trace.offsets, trace.num_experts, (0, 1)))

    def too_few_tokens():
        train(ids=ids[:-1])

    def rows_leave_one_out():
        train(rows=np.append(np.arange(1, len(ids)), -1))

    def rows_out_of_range():
        train(rows=np.arange(len(ids)) + 1)

    def micro_batch_out_of_range():
        train(index=CASE.micro_batches)

    def micro_batch_outside_of_batch():
        with ep.micro_batch(0):
            pass

    def forward_outside_of_micro_batch():
        with ep.batch(plan, trace, groups, optimizer):
            ep.model(ids)

    def batch_inside_of_batch():
        with ep.batch(plan, trace, groups, optimizer), ep.batch(plan, trace, groups, optimizer):
            pass

    def optimizer_state_of_another_shape():
        optimizer.state[experts.gate_up_proj]["rows"] = torch.zeros(3)
        train()

    def other_layers_on_one_rank():
        other_layers() if rank == 0 else train()

    def other_model_on_one_rank():
        another_model() if rank == 0 else train()

    def other_number_of_micro_batches_on_one_rank():
        ep.gather_loads(trace, groups, CASE.micro_batches + rank)

    def micro_batch_not_an_integer():
        train(index="0")

    def optimizer_made_too_early():
        with ep.batch(plan, trace, groups, torch.optim.SGD(ToyModel(CASE).parameters())):
            pass

    def optimizer_state_on_one_rank():
        experts = ep.layers[2].experts  # the layers before it must not have moved either
        if rank == 0:
            optimizer.state[experts.gate_up_proj]["momentum"] = torch.zeros_like(experts.gate_up_proj)
        train()

    def sharded_twice():
        ExpertParallel(ep.model, cluster)

    def wrong_group_size():
        ExpertParallel(ToyModel(CASE), ClusterSpec(1, CASE.ranks * 2))

    def fewer_experts_than_ranks():
        ExpertParallel(ToyModel(replace(CASE, experts=1, top_k=1)), cluster)

    def no_moe():
        ExpertParallel(torch.nn.Linear(2, 2), cluster)

    def other_micro_batch_on_one_rank():
        train(index=rank)

    def other_placement_on_one_rank():
        if rank == 1:
            ep.home = ep.home[:, ::-1].copy()
        train()

    def other_dense_weight_on_one_rank():
        if rank == 1:
            weight = ep.layers[2].router.weight.data.view(torch.int64)
            weight[-1, -1] ^= 1  # the last bit of the last element
        train()

    def other_dense_parameters_on_one_rank():
        if rank == 0:
            ep.model.extra = torch.nn.Linear(2, 2)
        train()

    def other_options_on_one_rank():
        ep.options = RuntimeOptions(redispatch=rank == 1)
        train()

    def backward_after_the_batch():
        with ep.batch(plan, trace, groups, optimizer), ep.micro_batch(0):
            loss = loss_sum(ep.model(ids), ids, torch.ones(len(ids), dtype=torch.bool))
        loss.backward()

    def recomputed_under_other_hooks():
        ep.model.checkpoint = "non-reentrant"
        hooks = torch.autograd.graph.save_on_cpu()
        with ep.batch(plan, trace, groups, optimizer):
            with ep.micro_batch(0), hooks:
                loss = loss_sum(ep.model(ids), ids, torch.ones(len(ids), dtype=torch.bool))
            loss.backward()

    def routed_otherwise():
        recorded = ep.layers[1].router.replay

        def other() -> tuple[torch.Tensor, bool]:
            chosen = recorded()[0].clone()
            chosen[0] = (chosen[0] + 1) % CASE.experts
            return chosen, False

        ep.layers[1].router.replay = other
        train()

    def optimizer_state_that_is_a_list():
        optimizer.state[experts.gate_up_proj]["history"] = [torch.zeros(3)]
        train()

    def master_of_another_shape():
        experts.down_proj.main_param = torch.zeros(3)
        train()

    def negative_option():
        RuntimeOptions(spare_rows=-1)

    def mesh_without_ep():
        ExpertParallel(ToyModel(CASE), cluster, init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp")))

    def mesh_of_three():
        mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("pp", "copies", "ep"))
        ExpertParallel(ToyModel(CASE), cluster, mesh)

    def beside(other: str) -> None:
        ExpertParallel(ToyModel(CASE), cluster, init_device_mesh("cpu", (1, 2), mesh_dim_names=(other, "ep")))

    def mesh_with_pp():
        beside("pp")

    def mesh_with_tp():
        beside("tp")

    def mesh_with_cp():
        beside("cp")

    def mesh_with_sp():
        beside("sp")

    def experts_sharded_before():
        model = ToyModel(CASE)
        fully_shard(model.moe[1])
        ExpertParallel(model, cluster)

    def unknown_reduction():
        ExpertParallel(ToyModel(CASE), cluster, reduction="median")

    def checkpoint_within_batch():
        with ep.batch(plan, trace, groups, optimizer):
            ep.save_checkpoint("nowhere", optimizer)

    def stats_before_a_batch():
        ep.stats()

    bad_input = locals()[name]
    try:
        bad_input()
    except ReLibraError as error:
        changed = not torch.equal(before, experts.gate_up_proj) or not np.array_equal(home, ep.home)
        return type(error).__name__, str(error), changed
    return "", "", True


def other_experts_in_one_copy(changed_rank: int) -> str:
    """The message on each of four ranks, two groups of two, where one expert of one rank differs."""
    cluster = ClusterSpec(1, 2, CASE.replica_slots)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "ep"))
    ep = ExpertParallel(ToyModel(CASE), cluster, mesh, model_name="toy")
    trace, groups, _ = make_batch(CASE, 0)
    plan = ep.plan(trace, groups, CASE.micro_batches, options=PlanOptions(balance=1.0))
    if dist.get_rank() == changed_rank:
        ep.layers[1].experts.down_proj.data[0, 0, 0] += 1e-12
    home = ep.home.copy()
    try:
        with ep.batch(plan, trace, groups, None):
            pass
    except ReLibraError as error:
        return str(error) if np.array_equal(home, ep.home) else "something moved"
    return "no error"


def dense_weights_that_may_differ() -> bool:
    """As ranks of tensor parallelism hold them: other values, other shapes."""
    options = RuntimeOptions(compare_dense=False)
    ep = ExpertParallel(ToyModel(CASE), ClusterSpec(1, CASE.ranks, CASE.replica_slots), options=options)
    ep.model.output.weight.data += dist.get_rank()
    ep.model.part = torch.nn.Parameter(torch.zeros(1 + dist.get_rank()))
    trace, groups, _ = make_batch(CASE, 0)
    with ep.batch(ep.plan(trace, groups, CASE.micro_batches, options=PlanOptions(balance=1.0)), trace, groups, None):
        return True


def weights_that_differ_later() -> bool:
    """Buffers may differ, and weights are compared when the first batch opens, not again."""
    cluster = ClusterSpec(1, CASE.ranks, CASE.replica_slots)
    ep = ExpertParallel(ToyModel(CASE), cluster)
    ep.model.register_buffer("seen", torch.tensor(dist.get_rank()))
    trace, groups, _ = make_batch(CASE, 0)
    for _ in range(2):
        plan = ep.plan(trace, groups, CASE.micro_batches, options=PlanOptions(balance=1.0))
        with ep.batch(plan, trace, groups, None):
            pass
        ep.model.output.weight.data += dist.get_rank()
    return True
