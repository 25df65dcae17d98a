"""Expert parallelism over `torch.distributed`: dispatch and combine, replicas, migration."""

from .layout import BatchLayout
from .runtime import ExpertParallel
from .session import RuntimeOptions

__all__ = ["BatchLayout", "ExpertParallel", "RuntimeOptions"]
