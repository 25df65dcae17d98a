"""Which function takes over the MoE layers of a model of another framework.

The package fills the table as it is imported. So the runtime can take over models of a framework without importing
what is written for that framework.
"""

from collections.abc import Callable
from typing import Any

# By the package that the classes of its models are from: a function of a model, which replaces its MoE layers in place.
TAKE_OVER: dict[str, Callable[[Any], object]] = {}
