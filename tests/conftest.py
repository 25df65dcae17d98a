"""Checks that hold for the whole test run."""

import os
import sys

import pytest

# Two tests run at a time, and ranks are processes: with more threads they would only wait for each other. Set before
# torch is imported; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def planner_is_imported_once():
    """The planner's files are `relibra_kernels.planner`; a top-level `planner` would be a second copy of them."""
    yield
    assert "planner" not in sys.modules, "something imported the top-level name `planner`"
