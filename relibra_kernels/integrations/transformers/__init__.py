"""Hugging Face transformers 5: importing this registers `"relibra"` for experts and for expert parallelism.

`model.set_experts_implementation("relibra")` computes the experts with our kernels, and `layers(model)` says of which
layers. `before = model.get_experts_implementation()`, made first, undoes it to the bit:
`model.set_experts_implementation(before)`.
`record_routing(model)` and `replay(model, trace)` work with any experts implementation.
"""

from .blocks import replace_moe_blocks
from .expert_parallel import communication
from .experts import expert_form, experts_forward
from .layers_in_use import LayerInUse, layers
from .planned_batch import batch, micro_batch, plan
from .recording import RoutingRecord, record_routing
from .replay import replay

__all__ = [
    "LayerInUse",
    "RoutingRecord",
    "batch",
    "communication",
    "expert_form",
    "experts_forward",
    "layers",
    "micro_batch",
    "plan",
    "record_routing",
    "replace_moe_blocks",
    "replay",
]
