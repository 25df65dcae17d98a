"""The planner: from recorded routing to where every expert lives and what each micro-batch replicates. Numpy only."""

from .cluster import ClusterSpec
from .errors import CommunicationError, FormatError, InputError, PlanError, ReLibraError, ShapeError
from .formats import from_vllm
from .loads import check_loads, count_loads, load_table
from .plan import BatchPlan, static_plan
from .planning import PlanOptions, plan_batch
from .splits import destinations, split_over_sources
from .trace import RoutingTrace

__all__ = [
    "BatchPlan",
    "ClusterSpec",
    "RoutingTrace",
    "PlanOptions",
    "plan_batch",
    "static_plan",
    "check_loads",
    "count_loads",
    "load_table",
    "split_over_sources",
    "destinations",
    "from_vllm",
    "ReLibraError",
    "InputError",
    "ShapeError",
    "FormatError",
    "PlanError",
    "CommunicationError",
]
