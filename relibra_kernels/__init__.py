"""ReLibra kernels: Mixture-of-Experts RL training as fast as if its load were perfectly balanced.

Public names are imported on first use, so that `import relibra_kernels.planner` needs numpy alone.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> the module that defines it
_PUBLIC = {
    "BatchPlan": "planner",
    "ClusterSpec": "planner",
    "RoutingTrace": "planner",
    "ReLibraError": "planner",
    "plan_batch": "planner",
    "ReplicatedExperts": "nn",
    "ReplicatedMoE": "nn",
    "TopKRouter": "nn",
    "ExpertParallel": "parallel",
    "RoutedBatch": "parallel",
    "warmup": "precompile",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
