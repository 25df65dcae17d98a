"""The functions that take over the MoE layers of other frameworks' models.

The package that is written for a framework enters its function here when it is imported. So the runtime can take over
such models without importing that package.
"""

from collections.abc import Callable
from typing import Any

# By the package that the classes of its models are from: a function of a model, which replaces its MoE layers in place.
TAKE_OVER: dict[str, Callable[[Any], object]] = {}
