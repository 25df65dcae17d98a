"""A batch around a trainer's own run of Megatron's schedule, whose forward steps and reduction need not know of it."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from megatron.core.utils import get_model_config
from torch import nn

from ..parallel import ExpertParallel
from ..parallel.routed_batch import RoutedBatch
from ..planner import BatchPlan

__all__ = ["batch_in_schedule"]


@contextmanager
def batch_in_schedule(
    ep: ExpertParallel,
    plan: BatchPlan,
    batch: RoutedBatch,
    optimizer: Any = None,
    *,
    model: nn.Module | Sequence[nn.Module],
) -> Iterator[None]:
    """`ep.batch(plan, batch, optimizer)`, within which `get_forward_backward_func()` of Megatron runs once. Collective.

    The n-th forward of a chunk is that of micro-batch n, for which it must be fed what `batch` says (`batch.rows`).
    The batch closes before `config.finalize_model_grads_func` reduces gradients, which Megatron calls in the schedule.

    Args:
        optimizer: `torch_optimizer(optimizer)` of Megatron's, whose state moves with the experts.
        model: what the schedule is given: a chunk of the model, or the list of its virtual stages; wrapped or not.

    Raises: as `ep.batch`; nothing is left changed.
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    config = get_model_config(chunks[0])
    finalize = config.finalize_model_grads_func
    with ExitStack() as opened:
        opened.enter_context(ep.batch(plan, batch, optimizer))

        def close_and_finalize(*args: Any, **kwargs: Any) -> Any:
            opened.close()
            return finalize(*args, **kwargs)

        if finalize is not None:
            config.finalize_model_grads_func = close_and_finalize
        originals = [chunk.__dict__.get("forward") for chunk in chunks]
        for chunk in chunks:
            chunk.forward = functools.partial(_forward, ep, iter(range(batch.num_micro_batches)), chunk.forward)
        try:
            yield
        finally:
            config.finalize_model_grads_func = finalize
            for chunk, original in zip(chunks, originals, strict=True):
                del chunk.forward
                if original is not None:
                    chunk.forward = original


def _forward(
    ep: ExpertParallel, micro_batches: Iterator[int], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    with ep.micro_batch(next(micro_batches)):
        return forward(*args, **kwargs)
