"""Training steps of the expert-parallel runtime on one rank, under a plan, from routing as uneven as recorded one."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from relibra_kernels import ClusterSpec, ExpertParallel, RoutingTrace
from relibra_kernels.cli.bench.layers import routing
from relibra_kernels.integrations.transformers import replace_moe_blocks
from relibra_kernels.parallel import RuntimeOptions

from .setting import Setting
from .step import make_model

MICRO_BATCHES = 2


@dataclass
class ParallelStep:
    """One batch of `MICRO_BATCHES` micro-batches, run again and again under one plan."""

    setting: Setting
    model: Any
    ep: ExpertParallel
    optimizer: torch.optim.Optimizer
    plan: Any
    trace: RoutingTrace
    micro_batch_of_sequence: np.ndarray
    inputs: list[tuple[torch.Tensor, np.ndarray]]
    loss: float = 0.0

    @classmethod
    @contextmanager
    def opened(cls, setting: Setting) -> Iterator[ParallelStep]:
        """With a process group of this one process."""
        with tempfile.TemporaryDirectory() as folder:
            store = dist.FileStore(str(Path(folder) / "store"), 1)
            dist.init_process_group(setting.size("nccl", "gloo"), store=store, rank=0, world_size=1)
            try:
                yield cls._made(setting)
            finally:
                dist.destroy_process_group()

    @classmethod
    def _made(cls, setting: Setting) -> ParallelStep:
        sequences, length = setting.size((8, 1024), (2, 9))
        model = make_model(setting)
        config = model.config
        replace_moe_blocks(model)
        generated = RuntimeOptions(on_shift="ignore")  # no router would choose this routing
        cluster = ClusterSpec(1, 1, replica_slots=2)
        ep = ExpertParallel(model, cluster, model_name="gpu", reduction="mean", options=generated)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        layers, experts, top_k = config.num_hidden_layers, config.num_experts, config.num_experts_per_tok
        ids = [routing(sequences * length, experts, top_k, 1.1, seed=layer).numpy() for layer in range(layers)]
        expert_ids = np.stack(ids, 1).astype(np.int16)
        offsets = np.arange(sequences + 1) * length
        expert_ids[offsets[1:] - 1] = -1  # engines do not record a sequence's last token
        trace = RoutingTrace(expert_ids, offsets, experts, tuple(range(layers)))
        micro_batches = np.arange(sequences) * MICRO_BATCHES // sequences
        tokens = torch.randint(3, config.vocab_size, (sequences, length), device=setting.device)
        inputs = []
        for m in range(MICRO_BATCHES):
            of = np.flatnonzero(micro_batches == m)
            rows = np.arange(len(of) * length)  # of the micro-batch's own sequences
            inputs.append((tokens[torch.from_numpy(of).to(setting.device)], rows))
        plan = ep.plan(trace, micro_batches, MICRO_BATCHES)
        return cls(setting, model, ep, optimizer, plan, trace, micro_batches, inputs)

    @property
    def tokens(self) -> int:
        return self.trace.num_tokens

    def run(self) -> None:
        """Open the batch, forward and backward of every micro-batch, clip, optimizer step."""
        total = torch.zeros((), device=self.setting.device)
        with self.ep.batch(self.plan, self.trace, self.micro_batch_of_sequence, self.optimizer):
            for m in range(MICRO_BATCHES):
                total += self._micro_batch(m)
        self.ep.reduce_gradients()
        self.ep.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = float(total) / MICRO_BATCHES

    def waits(self) -> list[str]:
        """Where a micro-batch waits for the device, by torch's own account; none in a rehearsal."""
        found: set[str] = set()
        with self.ep.batch(self.plan, self.trace, self.micro_batch_of_sequence, self.optimizer):
            for m in range(MICRO_BATCHES):
                with warnings.catch_warnings(record=True) as said, _waits_are_warnings(self.setting):
                    warnings.simplefilter("always")
                    self._micro_batch(m)
                found |= {f"{Path(w.filename).name}:{w.lineno}" for w in said if "synchron" in str(w.message)}
        self.optimizer.zero_grad(set_to_none=True)
        return sorted(found)

    def _micro_batch(self, m: int) -> torch.Tensor:
        ids, rows = self.inputs[m]
        with self.ep.micro_batch(m, rows):
            loss = self.model(ids, labels=ids, use_cache=False).loss
            loss.backward()
        return loss.detach()


@contextmanager
def _waits_are_warnings(setting: Setting) -> Iterator[None]:
    if setting.rehearse:
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
