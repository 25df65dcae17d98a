"""Megatron-core on ranks of a test: `examples/train_megatron.py` trained, and what it has then."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from hf_under_plan import moving_plan

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_megatron.py"


def example():
    if "train_megatron" not in sys.modules:
        spec = importlib.util.spec_from_file_location("train_megatron", EXAMPLE)
        sys.modules["train_megatron"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.parallel_state.initialize_model_parallel(expert_model_parallel_size=min(dist.get_world_size(), 2))
        module.cpu_in_place_of_cuda()
    return sys.modules["train_megatron"]


def trainer_that_moves(options: dict):
    """Under plans that move every expert in every step, and copy some."""

    class Moving(example().Trainer):
        def plan(self, batch, step):
            return moving_plan(self.ep.gather_loads(batch), step + 1)

    return Moving(**options)


def logical(trainer, tensor_of) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in trainer.ep.named_logical_parameters(tensor_of) if t is not None}


def train(steps: int, options: dict) -> dict:
    """Losses, gradients of the first step, parameters after the last; experts in logical order."""
    trainer = trainer_that_moves(options)
    losses, gradients, moved = [], {}, False
    for step in range(steps):
        losses.append(trainer.step(step))
        if step == 0:
            gradients = logical(trainer, lambda p: p.main_grad)
        moved |= bool((trainer.ep.home != np.arange(8) // (8 // trainer.ep.comm.size)).any())
    stats = trainer.ep.stats()
    parameters = logical(trainer, lambda p: p.data)
    results = {"losses": losses, "gradients": gradients, "parameters": parameters, "moved": moved}
    return results | {"copies": stats.replicas, "agreeing_share": stats.agreeing_share}


def exported(steps: int, options: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What an exporter of weights gets, after steps that moved the experts; and one layer's, as this rank has them."""
    from relibra_kernels.integrations.megatron_moe import named_weights

    trainer = trainer_that_moves(options)
    for step in range(steps):
        trainer.step(step)
    own = trainer.model.decoder.layers[1].mlp.experts.down_proj.detach().clone()
    return {name: tensor.detach().clone() for name, tensor in named_weights(trainer.ep)}, own


def loaded(weights: dict[str, torch.Tensor], options: dict) -> dict[str, torch.Tensor]:
    """What `named_weights` gives of the experts after `load_experts` of these, with experts where a plan moved them."""
    from relibra_kernels.integrations.megatron_moe import load_experts, named_weights

    trainer = trainer_that_moves(options)
    trainer.step(0)
    load_experts(trainer.model, weights.__getitem__)
    return {name: tensor.detach().clone() for name, tensor in named_weights(trainer.ep) if ".experts." in name}


def save(folder: str, steps: int, options: dict, before: str = "") -> float:
    """Train, write a checkpoint, and give the loss of the step after it. `before`: a method of the runtime."""
    trainer = trainer_that_moves(options)
    for step in range(steps):
        trainer.step(step)
    if before:
        getattr(trainer.ep, before)(example().torch_optimizer(trainer.optimizer))
    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    dist.barrier()
    trainer.save(Path(folder))
    return trainer.step(steps)


def resume(folder: str, steps: int, options: dict, weights_only: bool = False) -> float:
    trainer = trainer_that_moves(options)
    trainer.load(Path(folder), weights_only=weights_only)
    return trainer.step(steps)
