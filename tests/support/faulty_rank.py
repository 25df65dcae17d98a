"""One rank of a training that loses a rank: `python faulty_rank.py RANK SIZE FOLDER VICTIM STEP PHASE SIGNAL`.

Every step is saved to FOLDER. The victim sends itself SIGNAL when it gets to PHASE (a collective's phase that begins
so) in STEP. The others print the error that they stop with.
"""

import os
import signal
import sys
from contextlib import contextmanager
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
    """What is trained."""
    options = RuntimeOptions(watchdog_seconds=2.0)
    experts = 4 * size
    return Case(
        ranks=size,
        gpus_per_node=size,
        experts=experts,
        plan="shuffled",
        steps=STEPS,
        dtype=torch.float32,
        options=options,
    )


def main() -> None:
    rank, size, victim, deadly_step = (int(sys.argv[i]) for i in (1, 2, 4, 5))
    folder, phase, sent = Path(sys.argv[3]), sys.argv[6], signal.Signals[sys.argv[7]]
    torch.set_num_threads(1)
    case, now = case_of(size), -1
    if rank == victim:
        during = Comm.during

        @contextmanager
        def die(self: Comm, current: str):
            if now == deadly_step and current.startswith(phase):
                os.kill(os.getpid(), sent)
            with during(self, current):
                yield

        Comm.during = die
    timeout = timedelta(seconds=10)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timeout)
    try:
        ep, optimizer = start(case)
        for now in range(STEPS):
            train_steps(case, ep, optimizer, range(now, now + 1))
            ep.save_checkpoint(folder / str(now) / "step", optimizer)
    except CommunicationError as error:
        print(f"stopped: {error}", flush=True)
        os._exit(3)  # the group is broken: destroying it could wait for the dead rank


if __name__ == "__main__":
    main()
