"""Expert parallelism over `torch.distributed`: dispatch and combine, replicas, migration."""

from .routed_batch import RoutedBatch
from .runtime import ExpertParallel
from .session import RuntimeOptions

__all__ = ["ExpertParallel", "RoutedBatch", "RuntimeOptions"]
