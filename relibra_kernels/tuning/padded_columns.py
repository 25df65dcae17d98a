"""How much tiles compute beyond a weight's columns: multiply-adds issued over multiply-adds needed, counted.

A tile is computed whole, also where it reaches past the end of a weight, unless it is one of `configs/half_tiles.py`.
Rows past the end of a slot come on top; `bench/counted.py` counts those.
"""

from collections.abc import Sequence

from ..configs.config import GemmConfig, parse_config
from ..configs.half_tiles import computed_columns
from .compile_task import Task
from .models import Model
from .search_goal import layer_shape


def of_task(task: Task) -> tuple[int, int]:
    """(issued, needed) multiply-adds of a GEMM, for each row that it multiplies."""
    model = Model("", task.hidden_size, task.intermediate_size, 1, 1, task.form)
    n, d, _, _ = layer_shape(model, task.kernel, task.part).sizes(task.kernel)
    config = parse_config(task.config)
    assert isinstance(config, GemmConfig)
    both = 2 if task.kernel == "gate_up" else 1  # gate columns and the up columns that go with them
    if task.kernel == "grad_weight":
        issued = _up(n, config.block_m) * computed_columns(task.kernel, d, config.block_n)
    else:
        issued = computed_columns(task.kernel, n, config.block_n) * _up(d, config.block_k)
    return both * issued, both * n * d


def columns_issued(tasks: Sequence[Task]) -> dict[str, float]:
    """Issued over needed multiply-adds of a layer's GEMMs (`gates.large_tasks`): of each "kernel part", and "layer"."""
    counts = {f"{task.kernel} {task.part}": of_task(task) for task in tasks}
    issued, needed = (sum(column) for column in zip(*counts.values(), strict=True))
    return {**{name: one / other for name, (one, other) in counts.items()}, "layer": issued / needed}


def _up(count: int, block: int) -> int:
    return -(-count // block) * block
