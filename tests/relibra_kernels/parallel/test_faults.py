"""A rank that dies or hangs: the others stop with an error that says where, within the process-group timeout (10 s).

Nothing half-written is left where a checkpoint should be, and training goes on from the last one to the bit.
"""

import logging
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ep_checkpoints import load_and_train
from faulty_rank import STEPS, Fault, case_of, train_until_it_fails
from ranks import fork_context, one_rank
from toy_training import train_parallel

from relibra_kernels.parallel.comm.collectives import Comm
from relibra_kernels.parallel.comm.groups import Groups
from relibra_kernels.parallel.comm.watchdog import _watch, describe
from relibra_kernels.planner import ClusterSpec


@pytest.fixture(scope="module")
def uninterrupted(ranks):
    return ranks(2).run(train_parallel, case_of(2))


@pytest.mark.parametrize(
    ("phase", "step", "signal", "size"),
    [
        ("layer 0, moving", 1, "SIGKILL", 2),
        ("dispatch of layer 1", 0, "SIGKILL", 3),
        ("backward combine of layer 0", 2, "SIGKILL", 2),
        ("the reduction of dense gradients", 0, "SIGKILL", 2),
        ("writing the checkpoint", 1, "SIGKILL", 2),
        ("finishing", 1, "SIGKILL", 2),
        ("dispatch of layer 1, micro-batch 0, inside the node", 0, "SIGKILL", 4),
        ("combine of layer 0, micro-batch 0, between nodes", 1, "SIGSTOP", 4),
        ("combine of layer 0", 1, "SIGSTOP", 2),
    ],
)
def test_the_others_stop_with_an_error(ranks, uninterrupted, tmp_path, phase, step, signal, size):
    fault = Fault(size, phase, step, signal)
    start = time.monotonic()
    processes = [
        fork_context().Process(target=train_until_it_fails, args=(fault, rank, tmp_path)) for rank in range(size)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes[: fault.victim]:
            process.join(90)
        outcomes = [process.exitcode for process in processes[: fault.victim]]
    finally:
        for process in processes:
            process.kill()
            process.join()
    printed, errors = ([(tmp_path / f"{name}{rank}").read_text() for rank in range(size)] for name in ("out", "err"))
    for rank in range(fault.victim):
        assert outcomes[rank] == 3, (printed[rank], errors[rank])
        # with three ranks, a survivor may first notice in the exchange after
        assert f"stopped: rank {rank} of {size} failed in" in printed[rank]
        assert size > 2 or f"failed in {phase}" in printed[rank]
        assert "rank died, or did not answer" in printed[rank]
    assert time.monotonic() - start < 80
    if signal == "SIGSTOP":
        waits = size // 2 - 1  # for the victim, directly
        assert f"relibra: rank {waits} of {size} has waited" in errors[waits]
        assert f"rank {fault.victim} (last seen in" in errors[waits]

    saved = [s for s in range(STEPS) if (tmp_path / str(s) / "step").exists()]
    assert saved == list(range(step + (phase == "finishing")))
    if saved and size == 2 and signal == "SIGKILL":  # what is there is whole
        folder = str(tmp_path / str(saved[-1]))
        for rank, (_, resumed) in enumerate(ranks(2).run(load_and_train, case_of(2), folder, saved[-1] + 1)):
            for name, value in uninterrupted[rank]["parameters"].items():
                np.testing.assert_array_equal(resumed["parameters"][name], value)


class OnDevice:
    """A collective that a device works on: on NCCL `wait` returns at once."""

    done = False

    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        return self.done


def test_the_watchdog_sees_what_a_device_still_works_on(caplog):
    """From its completion, not from the host's wait; also where it belongs to a part of the group."""
    with one_rank():
        comm = Comm(None, 1)
        part = Comm(None, 1, comm.ledger, part_of=comm)
        comm._waits_on_host = part._waits_on_host = False
        work, gone = OnDevice(), threading.Event()
        with part.during("dispatch of layer 3"):
            part.wait(work)
        assert comm.position == (1, "dispatch of layer 3", True)
        arguments = weakref.ref(comm), gone, dist.HashStore(), 0.2
        thread = threading.Thread(target=_watch, args=arguments, daemon=True)
        with caplog.at_level(logging.WARNING, "relibra_kernels.parallel.comm.watchdog"):
            thread.start()
            deadline = time.monotonic() + 20
            while not caplog.records and time.monotonic() < deadline:
                time.sleep(0.05)
        gone.set()
        thread.join(10)
        assert "relibra: rank 0 of 1 has waited" in caplog.text and "in dispatch of layer 3 for" in caplog.text
        work.done = True
        assert comm.position == (1, "dispatch of layer 3", False)


def test_the_watchdog_names_who_is_behind():
    others = {0: (7, "combine of layer 1"), 2: (4, "dispatch of layer 0"), 3: None}
    line = describe(1, 4, 7, "combine of layer 1", 31.4, others)
    assert line == (
        "relibra: rank 1 of 4 has waited 31 s in combine of layer 1 for rank 2 (last seen in dispatch of layer 0, "
        "3 collectives behind), rank 3 (not seen yet)"
    )
    assert "no rank that is known to be behind" in describe(1, 2, 7, "combine", 31.4, {0: (7, "combine")})


WATCHED_TO_THE_END = """
import time
import torch.distributed as dist
from relibra_kernels.parallel.comm.watchdog import start_watchdog

class Comm:
    size, rank, ranks, position = 2, 0, (0, 1), (0, "", False)

dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", 0, 1, True), rank=0, world_size=1)
comms = [Comm() for _ in range(4)]
for comm in comms:
    start_watchdog(comm, 1e-4)  # nearly always inside the store
time.sleep(0.3)
"""


def test_a_process_ends_while_its_watchdogs_write():
    for _ in range(3):  # two of three aborted where the threads were left to Python's end
        done = subprocess.run([sys.executable, "-c", WATCHED_TO_THE_END], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


WATCHDOGS_LEFT = """
import atexit, threading


def left():  # registered before the watchdog's own, so it runs after it
    print([thread.name for thread in threading.enumerate() if thread.name == "relibra-watchdog"])


atexit.register(left)
import torch.distributed as dist
from relibra_kernels.parallel.comm.watchdog import start_watchdog


class Comm:
    size, rank, ranks, position = 2, 0, (0, 1), (0, "", False)


dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", 0, 1, True), rank=0, world_size=1)
comm = Comm()
start_watchdog(comm, 60.0)
"""


def test_no_watchdog_is_left_to_pythons_end():
    """One that is inside the store then aborts the process, in one run of six."""
    done = subprocess.run([sys.executable, "-c", WATCHDOGS_LEFT], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def reduce_and_end(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    _HELD.append(Groups(None, ClusterSpec(1, 2, 1)))  # as a run that is not closed
    for _ in range(9):
        total = torch.tensor([1.0])
        dist.all_reduce(total)
        float(total)
    dist.destroy_process_group()


_HELD = []


def test_a_process_ends_right_after_a_collective(tmp_path):
    for number in range(6):  # one of two aborted where nothing waited for gloo's workers
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.multiprocessing.start_processes(reduce_and_end, (str(folder),), nprocs=2, start_method="spawn")
