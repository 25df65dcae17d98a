"""Recorded routing in the forms that rollout engines and trainers hand over; `RoutingTrace.save` writes our own."""

from .megatron import from_megatron, from_megatron_lines
from .sglang import from_sglang, loads_from_sglang
from .trainers import from_nemo_rl, from_prime_rl, from_slime
from .verl import from_verl
from .vllm import from_vllm

__all__ = [
    "from_vllm",
    "from_sglang",
    "loads_from_sglang",
    "from_verl",
    "from_slime",
    "from_prime_rl",
    "from_nemo_rl",
    "from_megatron",
    "from_megatron_lines",
]
