"""The demo's ranks: one process each, which train on the rollouts under three policies and check the results."""

import math
import signal
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...integrations.transformers import replay
from ...parallel import ExpertParallel, RuntimeOptions
from ...planner.errors import CommunicationError
from .grpo import answer_tokens, make_inputs, sequence_losses
from .policies import CLUSTER, MICRO_BATCHES, MODEL_NAME, RANKS, Policy, micro_batch_of_sequence
from .rollout import Rollouts
from .toy import build_model

LEARNING_RATE = 1e-4
STALLED = 120.0  # seconds without a step, or the time limit where that is longer: the ranks are taken to hang
BYTES = {  # what the table reports -> the kinds of traffic it sums
    "token_bytes": ("counts", "slots", "gate weights", "dispatch", "combine", "backward dispatch", "backward combine"),
    "replica_bytes": ("replica_weights", "replica_gradients"),
    "migration_bytes": ("migration",),
}


@dataclass(frozen=True)
class Reference:
    """What one process gives: each sequence's loss and every gradient of the first batch, parameters after the last."""

    losses: Tensor
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        for name in ("gradients", "parameters"):
            save_file(getattr(self, name), folder / f"{name}.safetensors")
        save_file({"losses": self.losses}, folder / "losses.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "Reference":
        gradients, parameters = (load_file(folder / f"{name}.safetensors") for name in ("gradients", "parameters"))
        return cls(load_file(folder / "losses.safetensors")["losses"], gradients, parameters)


def train_alone(state: dict[str, Tensor], batches: list[Rollouts]) -> Reference:
    """One optimizer step a batch in this process, with the recorded routing replayed."""
    model = build_model(0)
    model.load_state_dict(state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    losses, gradients = [], {}
    for index, rollouts in enumerate(batches):
        optimizer.zero_grad()
        for m in range(MICRO_BATCHES):
            sequences = np.flatnonzero(micro_batch_of_sequence(rollouts.trace) == m)
            inputs = make_inputs(rollouts, sequences)
            stale: Literal["refuse", "ignore"] = (
                "refuse" if index == 0 else "ignore"
            )  # the weights have changed since the second was sampled
            with replay(model, rollouts.trace.select(sequences), rows=inputs.rows, on_shift=stale):
                loss = sequence_losses(model, inputs)
                (loss.sum() / answer_tokens(rollouts)).backward()
            if index == 0:
                losses.append(loss.detach())
        if index == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Reference(torch.cat(losses), gradients, parameters)


class Run:
    """One policy on one rank: its own model, experts and optimizer."""

    def __init__(self, policy: Policy, state: dict[str, Tensor], batches: list[Rollouts]):
        self.policy, self.batches = policy, batches
        self.model: nn.Module = build_model(0)
        self.model.load_state_dict(state)
        # the same batches again and again, one of the policies with made-up routing: the model leaves what was recorded
        options = RuntimeOptions(on_shift="ignore")
        self.ep = ExpertParallel(self.model, CLUSTER, model_name=MODEL_NAME, options=options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def forward_backward(self, index: int) -> Tensor:
        """Gradients of one batch; returns the losses of this rank's sequences."""
        rollouts, trace, plan = self.batches[index], self.policy.traces[index], self.policy.plans[index]
        mine = np.arange(self.ep.comm.rank, len(rollouts.tokens), RANKS)
        groups = micro_batch_of_sequence(rollouts.trace)[mine]
        self.optimizer.zero_grad()
        losses = []
        with self.ep.batch(plan, trace.select(mine), groups, self.optimizer):
            for m in range(MICRO_BATCHES):
                inputs = make_inputs(rollouts, mine[groups == m])
                with self.ep.micro_batch(m, inputs.rows):
                    loss = sequence_losses(self.model, inputs)
                    (loss.sum() / answer_tokens(rollouts)).backward()
                losses.append(loss.detach())
        self.ep.reduce_gradients()
        return torch.cat(losses)

    def timed_step(self) -> float:
        """Seconds of an optimizer step with migration and tables, mean over the batches: the slowest rank's."""
        dist.barrier()
        start = time.perf_counter()
        for index in range(len(self.batches)):
            self.forward_backward(index)
            self.optimizer.step()
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return float(seconds) / len(self.batches)


def _anyone(here: bool) -> bool:
    """Whether `here` is true on any rank. Collective."""
    so = torch.tensor(float(here))
    dist.all_reduce(so, op=dist.ReduceOp.MAX)
    return bool(so)


def check_parity(run: Run, reference: Reference) -> dict[str, float]:
    """Largest norm-wise relative errors of the planned run against one process, over a step, a migration and a step."""
    mine = run.forward_backward(0)
    everyone = torch.zeros_like(reference.losses)
    everyone[run.ep.comm.rank :: RANKS] = mine
    dist.all_reduce(everyone)
    gradients = dict(run.ep.named_logical_parameters(lambda parameter: parameter.grad))
    run.optimizer.step()
    run.forward_backward(1)
    run.optimizer.step()
    parameters = dict(run.ep.named_logical_parameters())
    return {
        "parity_loss": _relative_error(everyone, reference.losses),
        "parity_grad": max(_relative_error(gradients[name], g) for name, g in reference.gradients.items()),
        "parity_parameters": max(_relative_error(parameters[name], p) for name, p in reference.parameters.items()),
    }


def _relative_error(got: Tensor | None, expected: Tensor) -> float:
    """In the Frobenius norm; infinite where anything is missing or not finite, so that no maximum can pass over it."""
    error = float("inf") if got is None else float((got.double() - expected.double()).norm() / expected.double().norm())
    return error if math.isfinite(error) else float("inf")


def run_ranks(
    state: dict[str, Tensor],
    batches: list[Rollouts],
    policies: dict[str, Policy],
    reference: Reference,
    repeats: int,
    limit: float,
) -> Generator[None, None, dict[str, Any]]:
    """Start the ranks and return rank 0's results; yields for every step of `steps_to_run`, or for fewer.

    limit: seconds from now after which no further round begins, but the first timed one
    Raises: CommunicationError where a rank fails or dies, or none finishes a step for long.
    """
    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)  # weights go through files: shared memory is small in containers
        save_file(state, folder / "state.safetensors")
        reference.save(folder)
        try:
            arguments = (name, queue, batches, policies, repeats, time.monotonic() + limit)
            with _not_interrupted():
                ranks = mp.start_processes(_rank_main, arguments, nprocs=RANKS, join=False, start_method="spawn")
            results: dict[str, Any] | None = None
            while results is None:
                heard = time.monotonic()
                while queue.empty():
                    ranks.join(timeout=0.05)  # raises where a rank failed
                    if time.monotonic() - heard > max(limit, STALLED):
                        raise CommunicationError(f"the {RANKS} ranks finished no step in {max(limit, STALLED):g} s")
                results = queue.get()
                if results is None:
                    yield
            while not ranks.join():
                pass
        except (KeyboardInterrupt, GeneratorExit, CommunicationError):
            for process in ranks.processes:
                process.kill()
                process.join()
            raise
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            if isinstance(error, mp.ProcessRaisedException) and CommunicationError.__name__ not in str(error):
                raise  # a defect, which keeps its traceback
            reason = str(error).strip().splitlines()[-1]
            raise CommunicationError(f"rank {error.error_index} of {RANKS} failed: {reason}") from None
    return results


@contextmanager
def _not_interrupted() -> Iterator[None]:
    """Processes started within never see Ctrl-C, which a terminal sends to all; this one sees it at the end.

    They inherit the main thread's mask. Another thread may take the signal here, so that its handler waits too.
    """
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt


def steps_to_run(repeats: int) -> int:
    """How many steps `run_ranks` reports: the parity check, and a round of each run to warm up."""
    return 1 + 3 * (repeats + 1)


def _rank_main(
    rank: int,
    folder: str,
    queue: Any,
    batches: list[Rollouts],
    policies: dict[str, Policy],
    repeats: int,
    deadline: float,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    state = load_file(Path(folder) / "state.safetensors")

    def report(message: dict[str, Any] | None) -> None:
        if rank == 0:
            queue.put(message)

    results: dict[str, Any] = check_parity(Run(policies["planned"], state, batches), Reference.load(Path(folder)))
    report(None)
    runs = {name: Run(policy, state, batches) for name, policy in policies.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for repeat in range(repeats + 1):  # interleaved, so that a slow moment of the machine hits all alike
        if repeat > 1 and _anyone(time.monotonic() > deadline):
            break
        for name in order:
            took = runs[name].timed_step()
            if repeat == 0:  # the first round warms up
                runs[name].ep.comm.bytes_sent.clear()
            else:
                seconds[name].append(took)
            report(None)
        order.append(order.pop(0))
    results["rounds"] = len(seconds["static"])
    for name, run in runs.items():
        results[f"{name}_s"] = statistics.median(seconds[name])
        results[f"{name}_s_quartiles"] = np.quantile(seconds[name], [0.25, 0.75]).tolist()
        sent = run.ep.comm.bytes_sent
        for what, kinds in BYTES.items():
            total = torch.tensor([float(sum(n for (kind, _), n in sent.items() if kind in kinds))])
            dist.all_reduce(total)
            results[f"{name}_{what}_per_step"] = float(total) / (results["rounds"] * len(batches))
    report(results)
    dist.destroy_process_group()
