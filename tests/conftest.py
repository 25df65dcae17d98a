"""Checks that hold for the whole test run."""

import sys

import pytest


@pytest.fixture(autouse=True)
def planner_is_imported_once():
    """The planner's files are `relibra_kernels.planner`; a top-level `planner` would be a second copy of them."""
    yield
    assert "planner" not in sys.modules, "something imported the top-level name `planner`"
