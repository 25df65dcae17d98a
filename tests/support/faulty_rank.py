"""One rank of a training that loses a rank: `python faulty_rank.py RANK SIZE STORE VICTIM PHASE SIGNAL`.

The victim sends itself SIGNAL when it gets to PHASE (a collective's phase that begins so). The others print the error
that they stop with.
"""

import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from toy_training import Case, train_parallel

from relibra_kernels.parallel.comm import Comm
from relibra_kernels.planner import CommunicationError


def main() -> None:
    rank, size, victim = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4])
    store, phase, sent = sys.argv[3], sys.argv[5], signal.Signals[sys.argv[6]]
    torch.set_num_threads(1)
    if rank == victim:
        during = Comm.during

        @contextmanager
        def die(self: Comm, current: str):
            if current.startswith(phase):
                os.kill(os.getpid(), sent)
            with during(self, current):
                yield

        Comm.during = die
    timeout = timedelta(seconds=10)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    try:
        train_parallel(Case(ranks=size, gpus_per_node=size, experts=4 * size, plan="shuffled", steps=2))
    except CommunicationError as error:
        print(f"stopped: {error}", flush=True)
        os._exit(3)  # the group is broken: destroying it could wait for the dead rank


if __name__ == "__main__":
    main()
