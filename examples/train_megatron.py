"""Train a small Megatron-core GPT under plans: replayed routing, moved and replicated experts, checkpoint and resume.

    torchrun --nproc-per-node 2 examples/train_megatron.py

Needs megatron-core (0.16.1 or 0.19.2). The same file runs on GPUs (nccl) and, for trying it out, on CPUs (gloo), where
a few of Megatron's lines that ask for a CUDA device are answered with the CPU.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.overrides import TorchFunctionMode

from relibra_kernels import BatchPlan, RoutedBatch, RoutingTrace
from relibra_kernels.integrations.megatron_moe import expert_parallel, with_relibra_experts
from relibra_kernels.integrations.megatron_optimizer import torch_optimizer
from relibra_kernels.planner import PlanOptions

LAYERS, EXPERTS, TOP_K, VOCABULARY = 2, 8, 2, 64
SEQUENCES, LENGTH, MICRO_BATCHES = 8, 12, 2


def cpu_in_place_of_cuda() -> None:
    """What Megatron asks of CUDA where there is none: a device, and a random state of its own."""

    @contextlib.contextmanager
    def fork(*_: Any, **__: Any) -> Any:
        yield

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            if function is torch.Tensor.type and len(args) == 1 and not kwargs:  # the distributed optimizer asks
                return function(*args).replace("torch.", "torch.cuda.", 1)
            return function(*args, **kwargs)

    if not hasattr(moe_utils, "te_general_gemm"):  # the name that 0.16 forgets where Transformer Engine is missing
        moe_utils.te_general_gemm = None
    torch._dynamo.config.disable = True  # Megatron compiles small functions, which takes minutes
    OnCpu().__enter__()  # for as long as the process lives
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[assignment,method-assign]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.current_stream = lambda *_: None  # type: ignore[assignment,return-value]  # 0.19, of a reduction
    put = DistributedOptimizer._set_main_param_and_optimizer_states

    def put_with_step(self: Any, parameter: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        known = self._get_main_param_and_optimizer_states(parameter)  # of torch's Adam, whose step is in its state
        with torch.no_grad():
            put(self, parameter, {**known, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = put_with_step
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.fork = fork
    tensor_parallel.random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    tensor_parallel.random._set_cuda_rng_state = lambda *_, **__: None


def config_of(**options: Any) -> TransformerConfig:
    sizes: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "moe_ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOP_K,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "params_dtype": torch.float32,
    }
    return TransformerConfig(**{**sizes, **options})


def local_spec() -> Any:
    return get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)


def make_model(layer_spec: Any = None, position_embedding_type: Any = "rope", **options: Any) -> GPTModel:
    """The same weights on any number of ranks. layer_spec: None: `local_spec()`."""
    torch.manual_seed(1)
    spec = with_relibra_experts(local_spec() if layer_spec is None else layer_spec)
    config = config_of(**options)
    model = GPTModel(config, spec, VOCABULARY, LENGTH, position_embedding_type=position_embedding_type)
    return model.cuda() if torch.cuda.is_available() else model


def rollouts(step: int) -> tuple[torch.Tensor, RoutingTrace]:
    """Stands for an engine: token ids [sequences, tokens], and the experts that it recorded, some of them hot."""
    random = np.random.default_rng(step)
    tokens = torch.from_numpy(random.integers(0, VOCABULARY, (SEQUENCES, LENGTH)))
    scores = random.random((SEQUENCES * LENGTH, LAYERS, EXPERTS)) * (2.0 + np.roll(np.arange(EXPERTS), 3 * step))
    ids = scores.argsort(-1)[..., ::-1][..., :TOP_K].astype(np.int16)
    ids[LENGTH - 1 :: LENGTH] = -1  # the last sampled token is not recorded
    return tokens, RoutingTrace(ids, np.arange(SEQUENCES + 1) * LENGTH, EXPERTS, tuple(range(LAYERS)))


def rows_sequence_first(batch: int) -> np.ndarray:
    """Megatron's layers see [sequence, batch]: the trace's row of each token in that order."""
    return np.arange(batch * LENGTH).reshape(batch, LENGTH).T.reshape(-1)


def make_state(optimizer: Any) -> None:
    """What a checkpoint of the distributed optimizer is read into; Megatron makes it with Transformer Engine only."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        one.init_state_fn(one.optimizer)
        for state in one.optimizer.state.values():
            state.setdefault("step", torch.zeros(()))


class Trainer:
    """One rank: model, runtime, Megatron's DDP and optimizer.

    distributed: whether the optimizer's state is sharded over data parallel ranks. sharding: how that is saved.
    """

    def __init__(self, distributed: bool = False, sharding: str = "fully_reshardable", **options: Any):
        self.model, self.sharding, self.distributed = make_model(**options), sharding, distributed
        self.ep = expert_parallel(self.model, gpus_per_node=parallel_state.get_expert_model_parallel_world_size())
        how = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, average_in_collective=False, use_distributed_optimizer=distributed
        )
        self.ddp = DistributedDataParallel(self.model.config, how, self.model)
        settings = OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            adam_eps=1e-4,
            clip_grad=0.0,
            bf16=False,
            fp16=False,
            use_distributed_optimizer=distributed,
        )
        self.optimizer = get_megatron_optimizer(settings, [self.ddp])

    def plan(self, batch: RoutedBatch, step: int) -> BatchPlan:
        """Full balance, whatever it costs: left to itself, the planner moves nothing for so small a model."""
        return self.ep.plan(batch, options=PlanOptions(balance=1.0))

    def step(self, step: int) -> float:
        """One optimizer step over all sequences; the loss."""
        tokens, trace = rollouts(step)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        mine = np.arange(SEQUENCES)[rank::ranks]
        groups = np.arange(len(mine)) * MICRO_BATCHES // len(mine)
        batch = RoutedBatch(trace.select(mine), groups, MICRO_BATCHES)
        plan = self.plan(batch, step)
        self.ddp.zero_grad_buffer()
        total = torch.zeros(())
        with self.ep.batch(plan, batch, torch_optimizer(self.optimizer)):
            for m in range(MICRO_BATCHES):
                part = tokens[mine[groups == m]]
                with self.ep.micro_batch(m, rows_sequence_first(len(part))):
                    positions = torch.arange(LENGTH).expand_as(part)
                    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
                    losses = self.ddp(part, positions, mask, labels=part.roll(-1, 1))[:, :-1]
                    loss = losses.sum() / (SEQUENCES * (LENGTH - 1)) * ranks  # Megatron averages over ranks
                    loss.backward()
                total += loss.detach() / ranks
        finalize_model_grads([self.ddp])
        self.optimizer.step()
        dist.all_reduce(total)
        return float(total)

    def state(self, is_loading: bool = False) -> dict[str, Any]:
        metadata = {"distrib_optim_sharding_type": self.sharding}
        model = self.model.sharded_state_dict(metadata=metadata)
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model, is_loading, metadata=metadata)}

    def save(self, folder: Path) -> None:
        dist_checkpointing.save(self.state(), str(folder))

    def load(self, folder: Path, *, weights_only: bool = False) -> None:
        """Another expert-parallel size takes the weights; Megatron groups its optimizer's state by that size."""
        if weights_only:
            state = {"model": self.model.sharded_state_dict()}
        else:
            if self.distributed:
                make_state(self.optimizer)
            state = self.state(is_loading=True)
        loaded = dist_checkpointing.load(state, str(folder))
        self.model.load_state_dict(loaded["model"])
        if not weights_only:
            self.optimizer.load_state_dict(loaded["optimizer"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--checkpoint", type=Path, help="an empty folder; a temporary one where it is left out")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    if on_gpu:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    else:
        cpu_in_place_of_cuda()
    trainer = Trainer()
    losses = [trainer.step(step) for step in range(args.steps)]
    with tempfile.TemporaryDirectory() as temporary:
        folders = [args.checkpoint or Path(temporary)]
        dist.broadcast_object_list(folders)
        trainer.save(folders[0])
        resumed = Trainer()
        resumed.load(folders[0])
        again = resumed.step(args.steps)
        dist.barrier()
    if dist.get_rank() == 0:
        print("losses", " ".join(f"{loss:.6f}" for loss in losses))
    following = trainer.step(args.steps)
    if dist.get_rank() == 0:
        print(f"next step {following:.6f}, resumed from the checkpoint {again:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
