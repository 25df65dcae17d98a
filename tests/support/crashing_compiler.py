"""Stands in for the compiler in its worker processes: takes one config's process down, refuses another."""

import os

from relibra_kernels.tuning.compile_task import Outcome, Task
from relibra_kernels.tuning.compile_worker import serve
from relibra_kernels.tuning.launch_model import Resources


def compile_one(task: Task) -> Outcome:
    if task.config == "64x64x64w4s2":
        os._exit(1)
    if task.config == "64x64x64w4s3":
        return "PTXASError: no"
    print("what compilers print")
    return Resources(int(task.config.split("x")[0]), 0, 0, 8)


if __name__ == "__main__":
    serve(compile_one)
