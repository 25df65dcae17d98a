"""Expert parallelism over `torch.distributed`: dispatch and combine, replicas, migration."""

from .pretrained import load_pretrained, meta_parameters, save_pretrained
from .routed_batch import RoutedBatch
from .running import RecordedForwards
from .runtime import ExpertParallel
from .session import RuntimeOptions
from .stats import BatchStats

__all__ = [
    "BatchStats",
    "ExpertParallel",
    "RecordedForwards",
    "RoutedBatch",
    "RuntimeOptions",
    "load_pretrained",
    "meta_parameters",
    "save_pretrained",
]
