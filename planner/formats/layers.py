"""Which of the recorded layers are MoE layers: dense ones appear as layers of zeros."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import InputError, ShapeError
from ..trace_rules import checked_numbers
from .parts import missing_layers


class LayersFound(NamedTuple):
    """The MoE layers among the recorded ones, the layers that are left out, K, and what was assumed to find them."""

    layers: list[int]
    dropped: tuple[int, ...]
    top_k: int
    assumed: tuple[str, ...] = ()


class LayersSeen:
    """What the layers held, over all sequences that are added. Raises: ShapeError where their sizes differ."""

    def __init__(self, what: str):
        self._what = what
        self._shape: tuple[int, int] | None = None
        self._recorded = self._nonzero = np.zeros(0, bool)

    def add(self, staged_TLK: np.ndarray, name: str) -> None:
        layers, top_k = staged_TLK.shape[1:]
        if self._shape is None:
            self._shape = layers, top_k
            self._recorded, self._nonzero = np.zeros(layers, bool), np.zeros(layers, bool)
        if self._shape != (layers, top_k):
            raise ShapeError(
                f"{name} has {layers} layers and {top_k} choices a token, but must have the layers and k of the first, "
                f"{self._shape}"
            )
        recorded = ~missing_layers(staged_TLK)
        self._recorded |= recorded.any(0)
        if top_k == 1:
            self._nonzero |= ((staged_TLK[:, :, 0] > 0) & recorded).any(0)

    def moe_layers(self, named: Sequence[int] | None) -> LayersFound:
        """Those that are named, or all but a prefix without routing. Raises: InputError."""
        if self._shape is None:
            raise InputError(f"{self._what} holds no routing at all, so that its layers and choices are not known")
        count, top_k = self._shape
        if named is not None:
            return self._named(named, count, top_k)
        used = self._recorded if top_k > 1 else self._nonzero
        zeros_only = np.flatnonzero(self._recorded & ~used)
        if len(zeros_only):
            raise InputError(
                f"{self._what} has zeros only in layer {zeros_only[0]}: with one choice a token that is a dense layer, "
                "or one whose tokens all chose expert 0; name the MoE layers (moe_layer_ids, --moe-layers)"
            )
        if not used.any():
            return LayersFound(list(range(count)), (), top_k, (f"all {count} layers are MoE layers; none has routing",))
        first = int(np.argmax(used))
        lost = first + np.flatnonzero(~used[first:])
        if len(lost):
            raise InputError(
                f"{self._what} has no routing in the layers {lost.tolist()}, which come after MoE layers: a pipeline "
                "stage that was not gathered, or dense layers; name the MoE layers (moe_layer_ids, --moe-layers)"
            )
        return LayersFound(list(range(first, count)), tuple(range(first)), top_k)

    def _named(self, named: Sequence[int], count: int, top_k: int) -> LayersFound:
        layers = checked_numbers(named, "moe_layer_ids").tolist()
        if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= count:
            raise InputError(f"moe_layer_ids is {layers}, but {count} layers were recorded")
        return LayersFound(layers, tuple(layer for layer in range(count) if layer not in layers), top_k)
