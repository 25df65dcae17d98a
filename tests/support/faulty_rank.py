"""One rank of a training that loses a rank.

Every step is saved. The victim sends itself a signal when it gets to a collective's phase in one step. The others print
the error that they stop with.
"""

import os
import signal
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from toy_training import Case, start, train_steps

from relibra_kernels.parallel import RuntimeOptions
from relibra_kernels.parallel.comm.collectives import Comm
from relibra_kernels.planner import CommunicationError

STEPS = 3


def case_of(size: int) -> Case:
    """What is trained; on four ranks as two nodes, with two hops."""
    options = RuntimeOptions(watchdog_seconds=2.0, transport="two" if size == 4 else "one")
    experts = 4 * size
    return Case(
        ranks=size,
        gpus_per_node=2 if size == 4 else size,
        experts=experts,
        plan="shuffled",
        steps=STEPS,
        dtype=torch.float32,
        options=options,
    )


@dataclass(frozen=True)
class Fault:
    """Which rank is lost, when, and by which signal; `phase` is how a collective's phase begins."""

    size: int
    phase: str
    step: int
    signal: str

    @property
    def victim(self) -> int:
        return self.size - 1


def train_until_it_fails(fault: Fault, rank: int, folder: Path) -> None:
    """The rank's process: its output goes to `folder`; exit status 3 where the group broke."""
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_WRONLY), stream)
    torch.set_num_threads(1)
    case, now = case_of(fault.size), -1
    if rank == fault.victim:
        begins = Comm.begins

        def die(self: Comm, current: str):
            if now == fault.step and current.startswith(fault.phase):
                os.kill(os.getpid(), signal.Signals[fault.signal])
            begins(self, current)

        Comm.begins = die
    store, timeout = f"file://{folder}/store", timedelta(seconds=10)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=fault.size, timeout=timeout)
    try:
        ep, optimizer = start(case)
        for now in range(STEPS):
            train_steps(case, ep, optimizer, range(now, now + 1))
            ep.save_checkpoint(folder / str(now) / "step", optimizer)
    except CommunicationError as error:
        print(f"stopped: {error}", flush=True)
        os._exit(3)  # the group is broken: destroying it could wait for the dead rank
