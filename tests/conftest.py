"""Checks that hold for the whole test run."""

import os
import sys

import pytest

# Two tests run at a time, and ranks are processes: with more threads they would only wait for each other. Set before
# torch is imported; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure():
    """Tests of kernels must not pass on plain torch, which is what tensors on a CPU get unless told otherwise."""
    backend = os.environ.get("RELIBRA_BACKEND")
    if os.environ.get("TRITON_INTERPRET") == "1" and backend != "triton":
        raise pytest.UsageError(f"TRITON_INTERPRET is 1 and RELIBRA_BACKEND {backend!r}; it must be 'triton' then")


@pytest.fixture(autouse=True)
def planner_is_imported_once():
    """The planner's files are `relibra_kernels.planner`; a top-level `planner` would be a second copy of them."""
    yield
    assert "planner" not in sys.modules, "something imported the top-level name `planner`"
