"""Expert parallelism over `torch.distributed`: dispatch and combine, replicas, migration."""

from .runtime import ExpertParallel

__all__ = ["ExpertParallel"]
