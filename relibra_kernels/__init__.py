"""ReLibra kernels: even load over the GPUs of Mixture-of-Experts RL training.

Public names are imported on first use, so that `import relibra_kernels.planner` needs numpy alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .frameworks import TAKE_OVER

if TYPE_CHECKING:
    from .nn import ReplicatedExperts, ReplicatedMoE, TopKRouter
    from .parallel import ExpertParallel, RoutedBatch
    from .planner import BatchPlan, ClusterSpec, ReLibraError, RoutingTrace, plan_batch
    from .precompile import warmup

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "BatchPlan",
    "ClusterSpec",
    "RoutingTrace",
    "ReLibraError",
    "plan_batch",
    "ReplicatedExperts",
    "ReplicatedMoE",
    "TopKRouter",
    "ExpertParallel",
    "RoutedBatch",
    "warmup",
]

_FROM = {
    "nn": ("ReplicatedExperts", "ReplicatedMoE", "TopKRouter"),
    "parallel": ("ExpertParallel", "RoutedBatch"),
    "planner": ("BatchPlan", "ClusterSpec", "ReLibraError", "RoutingTrace", "plan_batch"),
    "precompile": ("warmup",),
}
_MODULE_OF = {name: module for module, names in _FROM.items() for name in names}

if not TYPE_CHECKING:  # to a type checker, a module with __getattr__ would have every name

    def __getattr__(name: str) -> object:
        if name in _MODULE_OF:
            value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _take_over_transformers(model: Any) -> None:
    from .integrations.transformers.blocks import replace_moe_blocks

    replace_moe_blocks(model)


TAKE_OVER["transformers"] = _take_over_transformers


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
