"""How much a GEMM's tiles compute beyond a weight's columns, counted.

A tile is computed whole, also where it reaches past the end of a weight, unless it is one of `configs/half_tiles.py`.
"""

from ..configs.config import GemmConfig, parse_config
from ..configs.half_tiles import computed_columns
from .compile_task import Task
from .models import Model
from .search_goal import layer_shape


def multiply_adds(task: Task) -> tuple[int, int]:
    """(issued, needed) for each row that a GEMM multiplies, over all columns of a weight."""
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


def _up(count: int, block: int) -> int:
    return -(-count // block) * block
