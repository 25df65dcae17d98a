"""Sums of experts' gradients over the micro-batches of a batch, in fp32 where the parameters have fewer bits.

Adding up 32 gradients in bf16 loses half a percent of them. So they are added up here, unrounded, and rounded to the
parameter's dtype once, when the batch closes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...weights import ExpertWeights, main_grads, zeros_fp32


class GradientSums:
    """The sums of a model's layers on one rank. They take memory from a layer's first backward in a batch on.

    Args:
        enabled: False: gradients go to autograd, in the parameters' dtype.
    """

    def __init__(self, enabled: bool):
        self._enabled = enabled
        self._sums: dict[int, ExpertWeights] = {}

    def of_layer(self, layer: int, parameters: ExpertWeights) -> ExpertWeights:
        """Where gradients of the layer are added: `main_grad`, else a sum of ours; None where autograd has them."""
        if layer not in self._sums:
            self._sums[layer] = parameters.map(self._new)
        if not any(hasattr(parameter, "main_grad") for parameter in parameters if parameter is not None):
            return self._sums[layer]
        pairs = zip(main_grads(parameters), self._sums[layer], strict=True)
        return ExpertWeights(*(own if main_grad is None else main_grad for main_grad, own in pairs))

    def gradients(self, layer: int, parameters: ExpertWeights) -> ExpertWeights:
        """The gradients as they stand, each a sum, `main_grad` or `.grad`; None where there is none."""
        sums = self.of_layer(layer, parameters) if layer in self._sums else main_grads(parameters)

        def of(parameter: Tensor | None, total: Tensor | None) -> Tensor | None:
            if parameter is None or not parameter.requires_grad:
                return None
            return parameter.grad if total is None else total

        return ExpertWeights(*(of(p, total) for p, total in zip(parameters, sums, strict=True)))

    @torch.no_grad()
    def close(self, weights_of: Callable[[int], ExpertWeights]) -> None:
        """Add the sums to `.grad`, each rounded once, and let go of them."""
        for layer, sums in self._sums.items():
            for parameter, total in zip(weights_of(layer), sums, strict=True):
                if parameter is not None and total is not None:
                    before = parameter.grad
                    parameter.grad = (total if before is None else total + before).to(parameter.dtype)
        self._sums.clear()

    def _new(self, parameter: Tensor) -> Tensor | None:
        rounded = parameter.dtype != torch.promote_types(parameter.dtype, torch.float32)
        trained = parameter.requires_grad and parameter.is_leaf  # what adapters add to a parameter is autograd's
        own = self._enabled and rounded and trained and getattr(parameter, "main_grad", None) is None
        return zeros_fp32(parameter) if own else None
