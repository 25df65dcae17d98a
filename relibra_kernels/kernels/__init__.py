"""The Triton kernels, behind the signatures of `relibra_kernels.reference`."""

from .gate_up import grouped_gemm_swiglu
from .grad_bias import grad_bias
from .grad_hidden import grad_hidden
from .grad_weight import grad_weight
from .grouped_gemm import grouped_gemm
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
