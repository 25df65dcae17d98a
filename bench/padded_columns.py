"""How much tiles compute beyond a weight's columns: multiply-adds issued over multiply-adds needed, counted.

Rows past the end of a slot come on top; `bench/counted.py` counts those.
"""

from relibra_kernels.configs.products import Product
from relibra_kernels.tuning.gates import large_tasks
from relibra_kernels.tuning.models import Model
from relibra_kernels.tuning.padded_columns import multiply_adds


def columns_issued(model: Model, product: Product) -> dict[str, float]:
    """Issued over needed multiply-adds of large batches on `product`: of each "kernel part" and of the "layer"."""
    counts = {f"{task.kernel} {task.part}": multiply_adds(task) for task in large_tasks([model], product, (0,))}
    issued, needed = (sum(column) for column in zip(*counts.values(), strict=True))
    return {**{name: one / other for name, (one, other) in counts.items()}, "layer": issued / needed}
