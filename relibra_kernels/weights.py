"""One store of experts' weights, or of their gradients."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class ExpertWeights(NamedTuple):
    """Tensors of several experts `[E, ...]` in the layout of an `ExpertForm`; biases only where the form has them.

    Weights always have gate_up (up alone where there is no gate) and down. As gradients, whatever is None is not
    computed.

    Adapted experts compute with `gate_up[e] + gate_up_left[e] @ gate_up_right[e]`, and so with down: the factors of a
    weight `[E, A, B]` are `[E, A, r]` and `[E, r, B]`, both or none of them there.
    """

    gate_up: Any
    down: Any
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    gate_up_left: torch.Tensor | None = None
    gate_up_right: torch.Tensor | None = None
    down_left: torch.Tensor | None = None
    down_right: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor | None]) -> "ExpertWeights":
        """`function` of every tensor that there is."""
        return ExpertWeights(*(None if tensor is None else function(tensor) for tensor in self))

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that there are."""
        return [tensor for tensor in self if tensor is not None]

    def is_adapted(self, name: str) -> bool:
        """Whether the weight of that name has factors."""
        return getattr(self, f"{name}_left") is not None

    def merged(self) -> "ExpertWeights":
        """The same without factors: new weights, to which they are added."""
        gate_up, down = self.gate_up, self.down
        if self.gate_up_left is not None and self.gate_up_right is not None:
            gate_up = gate_up + self.gate_up_left @ self.gate_up_right
        if self.down_left is not None and self.down_right is not None:
            down = down + self.down_left @ self.down_right
        return ExpertWeights(gate_up, down, self.gate_up_bias, self.down_bias)


def main_grads(parameters: ExpertWeights) -> ExpertWeights:
    """The fp32 `.main_grad` of every parameter that has one: gradients are added there and not returned."""
    return parameters.map(lambda parameter: getattr(parameter, "main_grad", None))


def zeros_fp32(like: torch.Tensor) -> torch.Tensor:
    """An empty gradient sum: fp32, or float64 for float64."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def replica_store(home: torch.Tensor, count: int) -> torch.Tensor:
    """Uninitialised memory for `count` replicas, a whole number of experts away from `home` `[E, ...]`.

    Kernels then reach homes and replicas by one index (`kernels.stores`). It takes the memory of one more expert.
    """
    size = math.prod(home.shape[1:])
    memory = home.new_empty((count + 1) * size)
    apart = (home.data_ptr() - memory.data_ptr()) // home.element_size()
    return memory[apart % max(size, 1) :][: count * size].view(count, *home.shape[1:])


def replica_buffers(replica: ExpertWeights, grad: ExpertWeights, *, zeroed: bool) -> ExpertWeights:
    """Buffers for the gradients of replicas; None for whatever is None in `grad`, the homes' buffers."""

    def beside(weight: torch.Tensor | None, home: torch.Tensor | None) -> torch.Tensor | None:
        if weight is None or home is None:
            return None
        store = replica_store(home, len(weight))
        return store.zero_() if zeroed else store

    return ExpertWeights(*(beside(weight, home) for weight, home in zip(replica, grad, strict=True)))


def gradient_buffers(parameters: ExpertWeights, main: ExpertWeights, needed: Sequence[bool]) -> ExpertWeights:
    """Where to add the gradients that are needed: `main_grad`, else new zeros."""
    buffers = []
    for parameter, main_grad, need in zip(parameters, main, needed, strict=True):
        new = parameter is not None and main_grad is None
        buffers.append((zeros_fp32(parameter) if new else main_grad) if need else None)
    return ExpertWeights(*buffers)


def returned_gradients(
    parameters: ExpertWeights, grad: ExpertWeights, main: ExpertWeights, needed: Sequence[bool]
) -> list[torch.Tensor | None]:
    """What backward returns for the parameters: the gradients in their dtypes, None where `main_grad` took it."""
    return [
        buffer.to(parameter.dtype) if need and buffer is not None and main_grad is None else None
        for parameter, buffer, main_grad, need in zip(parameters, grad, main, needed, strict=True)
    ]


def gradients_asked_for(ctx: Any, parameters: ExpertWeights) -> list[bool]:
    """Which of the parameters' gradients the backward that runs is to give. They are the last inputs of its forward.

    None where it is asked for gradients of other tensors alone (`torch.autograd.grad`, pipeline schedules that split
    backward): what is added to a `main_grad`, or summed over a batch, would be added twice.
    """
    there = [parameter is not None for parameter in parameters]
    nodes = iter([node for node, _ in ctx.next_functions[len(ctx.next_functions) - sum(there) :]])
    needed = ctx.needs_input_grad[len(ctx.needs_input_grad) - len(there) :]
    return [is_there and _will_run(next(nodes)) and need for is_there, need in zip(there, needed, strict=True)]


def _will_run(node: Any) -> bool:
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a parameter is what `torch.autograd.grad` is asked for
        return True
