"""Optimizer state of experts that is sharded within each expert, on every rank of two expert-parallel groups."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from toy_training import Case, ToyModel, loss_sum, make_batch, make_plan, model_input

from relibra_kernels.parallel import ExpertParallel, RoutedBatch
from relibra_kernels.planner import ClusterSpec, InputError

MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdamW(torch.optim.Optimizer):
    """AdamW; the moments of `experts` are sharded along `dim` over `mesh`, whose ranks have the same gradients."""

    def __init__(
        self, model: torch.nn.Module, experts: list[torch.nn.Parameter], mesh: DeviceMesh, dim: int, lr: float
    ):
        super().__init__(model.parameters(), {"lr": lr})
        self.mesh, self.dim, self.experts = mesh, dim, {id(parameter) for parameter in experts}

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            self._step(parameter, self.state[parameter], self.param_groups[0]["lr"])

    def _step(self, parameter: torch.nn.Parameter, state: dict[str, Any], lr: float) -> None:
        def of_this_rank(tensor: torch.Tensor) -> torch.Tensor:
            sharded = id(parameter) in self.experts
            return distribute_tensor(tensor, self.mesh, [Shard(self.dim)]) if sharded else tensor

        def local(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to_local() if id(parameter) in self.experts else tensor

        for name in MOMENTS:
            if name not in state:
                state[name] = of_this_rank(torch.zeros_like(parameter))
        state["step"] = state.get("step", 0) + 1
        gradient = of_this_rank(parameter.grad)
        first, second, grad = local(state["exp_avg"]), local(state["exp_avg_sq"]), local(gradient)
        first.mul_(0.9).add_(grad, alpha=0.1)
        second.mul_(0.999).addcmul_(grad, grad, value=0.001)
        denominator = (second / (1 - 0.999 ** state["step"])).sqrt() + 1e-6
        grad.copy_(first / (1 - 0.9 ** state["step"]) / denominator)
        parameter.mul_(1 - lr * 0.01)
        parameter.sub_(gradient.full_tensor() if id(parameter) in self.experts else gradient, alpha=lr)


def start_sharded(case: Case, dim: int) -> tuple[ExpertParallel, ShardedAdamW]:
    mesh = init_device_mesh("cpu", (2, case.ranks // 2), mesh_dim_names=("copies", "ep"))
    model = ToyModel(case)
    ep = ExpertParallel(model, ClusterSpec(1, case.ranks // 2, case.replica_slots), mesh)
    return ep, ShardedAdamW(model, ep.expert_parameters(), mesh["copies"], dim, case.learning_rate)


def train_sharded(case: Case, ep: ExpertParallel, optimizer: ShardedAdamW, steps: range) -> int:
    """Steps under shuffled plans; how many experts moved."""
    moved, rank = 0, dist.get_rank()
    for step in steps:
        trace, groups, tokens = make_batch(case, step)
        mine = np.arange(rank, trace.num_sequences, case.ranks)
        my_trace, my_groups = trace.select(mine), groups[mine]
        plan = make_plan(case, ep, RoutedBatch(my_trace, my_groups, case.micro_batches), step)
        moved += int((plan.home != ep.home).sum())
        optimizer.zero_grad()
        with ep.batch(plan, my_trace, my_groups, optimizer):
            for m in range(case.micro_batches):
                ids, rows, counted = model_input(case, my_trace, tokens, mine, np.flatnonzero(my_groups == m))
                with ep.micro_batch(m, rows):
                    (loss_sum(ep.model(ids), ids, counted) / trace.num_tokens).backward()
        ep.reduce_gradients()
        optimizer.step()
    return moved


def logical_state(ep: ExpertParallel, optimizer: ShardedAdamW) -> dict[str, np.ndarray]:
    """Parameters and moments of the whole model, experts whole and in logical order."""
    state = {name: value.numpy().copy() for name, value in ep.named_logical_parameters()}
    for key in MOMENTS:
        moments = ep.named_logical_parameters(lambda parameter, key=key: optimizer.state[parameter][key])
        state |= {f"{name}.{key}": value.numpy().copy() for name, value in moments}
    return state


def train_and_move(case: Case, dim: int, folder: str) -> dict[str, Any]:
    """Train; then move experts and save, which must leave the logical state as it is."""
    ep, optimizer = start_sharded(case, dim)
    moved = train_sharded(case, ep, optimizer, range(case.steps))
    trained = logical_state(ep, optimizer)
    parts = [p.clone() for p in (optimizer.state[e]["exp_avg"].to_local() for e in ep.expert_parameters())]
    trace, groups, _ = make_batch(case, case.steps)
    mine = np.arange(dist.get_rank(), trace.num_sequences, case.ranks)
    plan = make_plan(case, ep, RoutedBatch(trace.select(mine), groups[mine], case.micro_batches), case.steps)
    with ep.batch(plan, trace.select(mine), groups[mine], optimizer):
        pass
    now = [optimizer.state[e]["exp_avg"].to_local() for e in ep.expert_parameters()]
    changed = sum(not torch.equal(a, b) for a, b in zip(parts, now, strict=True))
    ep.save_checkpoint(Path(folder) / "step", optimizer)
    state = logical_state(ep, optimizer)
    fresh, new_optimizer = start_sharded(case, dim)
    fresh.load_checkpoint(Path(folder) / "step", new_optimizer)
    return {
        "moved": moved,
        "changed": changed,
        "trained": trained,
        "after moving": state,
        "loaded": logical_state(fresh, new_optimizer),
        "shapes": [tuple(part.shape) for part in now],
    }


def refused_to_save(case: Case, folder: str) -> str:
    """Why a checkpoint of state that is sharded over the experts is refused."""
    ep, optimizer = start_sharded(case, 0)
    for parameter in ep.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    try:
        ep.save_checkpoint(Path(folder) / "step", optimizer)
    except InputError as error:
        return str(error)
    return "saved"
