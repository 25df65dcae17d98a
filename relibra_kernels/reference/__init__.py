"""The kernels' functions in plain torch: the CPU backend, and what the kernels are tested against.

Every public name here has the same signature in `relibra_kernels.kernels`.
"""

from .grouped_gemm import grad_bias, grad_hidden, grad_weight, grouped_gemm, grouped_gemm_swiglu
from .payload import pack_gradients, pack_payload, unpack_gradients, unpack_payload
from .replica_reduce import pack_replicas, replica_reduce
from .schedule import build_schedule, build_schedules
from .swiglu import swiglu, swiglu_backward
from .unpermute import unpermute

__all__ = [
    "build_schedule",
    "build_schedules",
    "grad_bias",
    "grad_hidden",
    "grad_weight",
    "grouped_gemm",
    "grouped_gemm_swiglu",
    "pack_gradients",
    "pack_payload",
    "pack_replicas",
    "replica_reduce",
    "swiglu",
    "swiglu_backward",
    "unpack_gradients",
    "unpack_payload",
    "unpermute",
]
