"""Pick who computes: the Triton kernels on GPUs, the plain torch reference elsewhere.

`RELIBRA_BACKEND=triton|reference` forces one. Triton on CPU tensors needs its interpreter (`TRITON_INTERPRET=1`).
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar, cast

import torch

from . import reference
from .planner.errors import InputError


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def backend(device: torch.device) -> ModuleType:
    """The package whose functions take tensors of `device`: `relibra_kernels.kernels` or `relibra_kernels.reference`.

    Raises: InputError where `RELIBRA_BACKEND` names no backend, or one that cannot take these tensors.
    """
    forced = os.environ.get("RELIBRA_BACKEND")
    if forced not in (None, "", "triton", "reference"):
        raise InputError(f"RELIBRA_BACKEND is {forced!r}; it must be 'triton' or 'reference'")
    if forced == "reference":
        return reference
    if forced == "triton":
        if not _triton_is_installed():
            raise InputError("RELIBRA_BACKEND is 'triton', but triton is not installed")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise InputError("RELIBRA_BACKEND is 'triton' and the tensors are on the CPU: set TRITON_INTERPRET=1 too")
    elif device.type not in ("cuda", "meta") or not _triton_is_installed():
        return reference  # ROCm devices are "cuda", recorded launches "meta"
    return _kernels()


@functools.cache
def _kernels() -> ModuleType:
    from . import kernels

    return kernels


Function = TypeVar("Function", bound=Callable[..., Any])


def _by_device(function: Function) -> Function:
    """The function of that name of the backend for its first argument's device."""

    @functools.wraps(function)
    def call(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(backend(first.device), function.__name__)(first, *args, **kwargs)

    return cast(Function, call)


build_schedule = _by_device(reference.build_schedule)
build_schedules = _by_device(reference.build_schedules)
pack_payload = _by_device(reference.pack_payload)
unpack_payload = _by_device(reference.unpack_payload)
pack_gradients = _by_device(reference.pack_gradients)
unpack_gradients = _by_device(reference.unpack_gradients)
unpermute = _by_device(reference.unpermute)
swiglu = _by_device(reference.swiglu)
swiglu_backward = _by_device(reference.swiglu_backward)
grouped_gemm = _by_device(reference.grouped_gemm)
grouped_gemm_swiglu = _by_device(reference.grouped_gemm_swiglu)
grad_hidden = _by_device(reference.grad_hidden)
grad_weight = _by_device(reference.grad_weight)
grad_bias = _by_device(reference.grad_bias)
replica_reduce = _by_device(reference.replica_reduce)
pack_replicas = _by_device(reference.pack_replicas)
