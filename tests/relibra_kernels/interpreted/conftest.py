"""These tests run in Triton's interpreter, in a process of their own: see tests/relibra_kernels/test_interpreted.py."""

import os

import numpy as np
import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """New tensors hold NaN (integers: a number out of every range) until they are written."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(torch.iinfo(tensor.dtype).min // 2)

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(autouse=True, scope="session")
def interpreter_with_reductions():
    """No interpreter of Triton 3.6 to 3.9 has a descriptor's atomic_add: what the hardware does, in bounds only."""
    from triton._C.libtriton import interpreter
    from triton.runtime.interpreter import InterpreterBuilder

    if hasattr(InterpreterBuilder, "create_descriptor_reduce"):
        return

    def reduce(self, kind, descriptor, value, indices):
        assert "ADD" in str(kind).upper(), kind
        pointers, mask = descriptor.materialize_pointers(indices)
        mask = getattr(mask, "data", mask)
        old = interpreter.load(pointers.data, mask, np.zeros_like(value.data), value.data.dtype)
        interpreter.store(pointers.data, old + value.data, mask)

    InterpreterBuilder.create_descriptor_reduce = reduce
