"""Rollouts from a vLLM process through files: the trainer's side. vllm_server.py is the other one.

A request is a folder `rank<r>-step<s>` with prompts.json. The answer in it is `routed/<i>.npy`, [N - 1, L, K] a
sequence as vLLM records it, samples.jsonl, and last of all `done`. Weights are a checkpoint that rank 0 writes.
"""

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from grpo_qwen3_moe import DIGITS, Samples
from torch import nn

from relibra_kernels.cli.demo.toy import EOS
from relibra_kernels.planner import from_vllm
from relibra_kernels.planner.errors import CommunicationError
from relibra_kernels.planner.formats.reading import read_arrays, read_json_lines

PATIENCE = 300.0  # seconds for one answer; the first one includes vLLM's start


def start_server(python: Path, folder: Path, ranks: int) -> subprocess.Popen[bytes]:
    """vLLM in its own environment, answering what is put into `folder`; its output goes to vllm.log there."""
    with (folder / "vllm.log").open("wb") as log:
        command = [str(python), str(Path(__file__).with_name("vllm_server.py")), str(folder), str(ranks)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


class VllmEngine:
    """One rank's side: weights out, routing and samples back."""

    def __init__(self, folder: Path, rank: int, model: nn.Module):
        self._folder, self._rank, self._model = folder, rank, model

    def load(self, state: dict[str, torch.Tensor], step: int) -> None:
        if self._rank == 0:
            self._model.load_state_dict(state)
            self._model.save_pretrained(self._folder / f"weights-{step}")
        dist.barrier()

    def sample(self, prompts: np.ndarray, step: int) -> Samples:
        request = self._folder / f"rank{self._rank}-step{step}"
        request.mkdir()
        content = {"prompts": prompts.tolist(), "max_tokens": DIGITS + 1, "eos": EOS, "seed": 2 * step + self._rank}
        (request / "prompts.tmp").write_text(json.dumps(content))
        (request / "prompts.tmp").rename(request / "prompts.json")
        self._wait_for(request / "done")
        samples = read_json_lines(request / "samples.jsonl")
        token_ids = [sample["token_ids"] for sample in samples]
        trace = from_vllm(read_arrays(request / "routed"), self._model.config.num_experts, token_ids=token_ids)
        return Samples(token_ids, [np.array(sample["log_probs"], np.float32) for sample in samples], trace)

    def _wait_for(self, path: Path) -> None:
        end = time.monotonic() + PATIENCE
        while not path.exists():
            log = self._folder / "vllm.log"
            if (self._folder / "ended").exists() or time.monotonic() > end:
                raise CommunicationError(
                    f"the vLLM process ended, or did not answer: {log} ends\n{log.read_text()[-3000:]}"
                )
            time.sleep(0.05)
