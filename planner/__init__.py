"""The planner: from recorded routing to where every expert lives and what each micro-batch replicates. Numpy only."""

from .cluster import ClusterSpec
from .errors import CommunicationError, FormatError, InputError, PlanError, PolicyError, ReLibraError, ShapeError
from .formats import (
    from_megatron,
    from_megatron_lines,
    from_nemo_rl,
    from_prime_rl,
    from_sglang,
    from_slime,
    from_verl,
    from_vllm,
    loads_from_sglang,
)
from .loads import check_loads, count_loads, load_table
from .options import PlanOptions
from .plan import BatchPlan, static_plan
from .planning import plan_batch, replan, scaled_loads
from .pricing.cost import Cost, Setting, price, replica_bytes
from .pricing.devices import DEVICES, DeviceSpec, find_device
from .pricing.estimate import Estimate, estimate_plan
from .pricing.models import MODELS, ModelShape, find_model, model_of_routing
from .pricing.outcome import Outcome, outcome_of_plan
from .simulation.generator import generate_loads, generate_trace
from .simulation.simulate import Result, Scenario, simulate
from .splits import destinations, split_of_source
from .trace import RoutingTrace

__all__ = [
    "BatchPlan",
    "ClusterSpec",
    "RoutingTrace",
    "PlanOptions",
    "plan_batch",
    "replan",
    "scaled_loads",
    "static_plan",
    "check_loads",
    "count_loads",
    "load_table",
    "split_of_source",
    "destinations",
    "from_vllm",
    "from_sglang",
    "loads_from_sglang",
    "from_verl",
    "from_slime",
    "from_prime_rl",
    "from_nemo_rl",
    "from_megatron",
    "from_megatron_lines",
    "DeviceSpec",
    "ModelShape",
    "DEVICES",
    "MODELS",
    "estimate_plan",
    "find_device",
    "find_model",
    "model_of_routing",
    "Outcome",
    "outcome_of_plan",
    "price",
    "Setting",
    "Cost",
    "Estimate",
    "replica_bytes",
    "generate_loads",
    "generate_trace",
    "Scenario",
    "Result",
    "simulate",
    "ReLibraError",
    "InputError",
    "ShapeError",
    "FormatError",
    "PlanError",
    "PolicyError",
    "CommunicationError",
]
