"""How much tiles compute beyond a weight's columns: multiply-adds issued over multiply-adds needed, counted.

A tile is computed whole, also where it reaches past the end of a weight. Rows past the end of a slot come on top;
`bench/counted.py` counts those.
"""

from relibra_kernels.configs.config import GemmConfig, parse_config
from relibra_kernels.configs.products import Product
from relibra_kernels.tuning.gates import large_tasks
from relibra_kernels.tuning.models import Model
from relibra_kernels.tuning.search_goal import layer_shape


def columns_issued(model: Model, product: Product) -> dict[str, float]:
    """Issued over needed multiply-adds of large batches on `product`: of each "kernel part" and of the "layer"."""
    found, issued_in_all, needed_in_all = {}, 0, 0
    for task in large_tasks([model], product, (0,)):
        n, d, _, _ = layer_shape(model, task.kernel, task.part).sizes(task.kernel)
        config = parse_config(task.config)
        assert isinstance(config, GemmConfig)
        both = 2 if task.kernel == "gate_up" else 1  # gate columns and the up columns that go with them
        tile = (config.block_m, config.block_n) if task.kernel == "grad_weight" else (config.block_n, config.block_k)
        issued = both * _up(n, tile[0]) * _up(d, tile[1])
        found[f"{task.kernel} {task.part}"] = issued / (both * n * d)
        issued_in_all, needed_in_all = issued_in_all + issued, needed_in_all + both * n * d
    return {**found, "layer": issued_in_all / needed_in_all}


def _up(count: int, block: int) -> int:
    return -(-count // block) * block
