"""One store of experts' weights, or of their gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class ExpertWeights(NamedTuple):
    """Tensors of several experts `[E, ...]` in the layout of an `ExpertForm`; biases only where the form has them.

    Weights always have gate_up and down. As gradients, whatever is None is not computed.
    """

    gate_up: Any
    down: Any
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "ExpertWeights":
        """`function` of every tensor that there is."""
        return ExpertWeights(*(None if tensor is None else function(tensor) for tensor in self))

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that there are."""
        return [tensor for tensor in self if tensor is not None]
