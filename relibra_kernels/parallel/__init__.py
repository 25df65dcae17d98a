"""Expert parallelism over `torch.distributed`: dispatch and combine, replicas, migration."""

from .runtime import ExpertParallel
from .session import RuntimeOptions

__all__ = ["ExpertParallel", "RuntimeOptions"]
