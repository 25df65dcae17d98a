"""How the layers of a model are run: under the micro-batch that a forward belongs to, or live where it has none."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ..alignment import Alignment
from ..planner import RoutingTrace
from ..planner.errors import InputError
from .batch import OpenBatch
from .live import LiveRouting
from .microbatch import AnyMicroBatch
from .routed_batch import RoutedBatch
from .session import ForwardContext
from .tokens.layer import Experts


class ModelRunner:
    """The layers of one model. Every layer's dispatcher and router ask it.

    Args:
        model: theirs, for those who know the model by its runner.

    Attributes:
        live: routing where no batch is open.
        forwards: which micro-batch a forward belongs to.
        batch: the one that is open. closed: whether nothing may run any more.
    """

    def __init__(self, live: LiveRouting, model: nn.Module | None = None):
        self.live, self.model = live, model
        self.forwards: ForwardContext[AnyMicroBatch] = ForwardContext()
        self.batch: OpenBatch | None = None
        self.closed = False
        self._record: RecordedForwards | None = None

    @property
    def home(self) -> np.ndarray:
        return self.live.home

    def copy(self) -> LiveRouting:
        return self.live.copy()

    def recorded(self, layer: int) -> tuple[Tensor, bool] | None:
        found = self._find(layer)
        return None if found is None else found.recorded(layer)

    def alignment(self, layer: int) -> Alignment | None:
        if self.forwards.recomputes:  # its forward was compared
            return None
        found = self._find(layer)
        return None if found is None else found.alignment(layer)

    def run(self, layer: int, experts: Experts, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        found = self._find(layer)
        if found is not None:
            return found.run(layer, experts, x_TH, index_TK, weights_TK)
        if self._record is not None:
            self._record.choose(layer, index_TK)
        return self.live.run(layer, experts, x_TH, index_TK, weights_TK)

    @contextmanager
    def running(self, batch: OpenBatch) -> Iterator[None]:
        """Within, `batch` is open: a forward is of one of its micro-batches. It is finished at the end."""
        self.batch = batch
        try:
            with batch.running():
                yield
        finally:
            self.batch = None

    def open_batch(self) -> OpenBatch:
        """The batch that is open, for its next micro-batch. Raises: InputError where there is none, or one is open."""
        if self.batch is None:
            raise InputError("micro_batch is used outside of batch: open `with ep.batch(plan, ...)` first")
        if self.forwards.open is not None:
            raise InputError("a micro-batch is open already: leave it before the next begins")
        return self.batch

    @contextmanager
    def recording(self, record: "RecordedForwards") -> Iterator[None]:
        """Within, live forwards are recorded."""
        before, self._record = self._record, record
        try:
            yield
        finally:
            self._record = before

    def _find(self, layer: int) -> AnyMicroBatch | None:
        if self.closed:
            raise InputError(f"MoE layer {layer} runs after ExpertParallel.close: its experts cannot be reached")
        found = self.forwards.find()
        if found is None and self.batch is not None:
            if not self.forwards.recomputes:
                raise InputError(
                    f"MoE layer {layer} runs in a batch, but outside of a micro-batch: use `with ep.micro_batch(m)`"
                )
            raise InputError(
                f"MoE layer {layer} is recomputed in a backward that does not say for which micro-batch: other "
                "saved-tensor hooks hide the inputs of its checkpointed block"
            )
        return found


class RecordedForwards:
    """What the routers of a model chose in some forwards, each of which is a micro-batch.

    Args:
        num_layers, num_experts: of the model.
    """

    def __init__(self, num_layers: int, num_experts: int):
        self._num_layers, self._num_experts = num_layers, num_experts
        self._forwards: list[list[Tensor]] = []

    def choose(self, layer: int, index_TK: Tensor) -> None:
        """Note what one layer of a forward chose."""
        if layer == 0:
            self._forwards.append([])
        if not self._forwards or len(self._forwards[-1]) != layer:
            raise InputError(f"MoE layer {layer} ran out of turn while routing is recorded; layers run in order")
        self._forwards[-1].append(index_TK.detach().clone())

    def routed_batch(self, rows: list[np.ndarray] | None = None) -> RoutedBatch:
        """The routed batch of this rank whose micro-batches are the forwards that ran, in their order.

        Args:
            rows: for each forward, int [tokens fed]: the place of each token in what is trained on, -1 for padding,
                which is left out. They are the batch's `rows`. None: every token is trained on.

        Raises: InputError where a forward did not run all layers, or rows do not fit.
        """
        if not self._forwards:
            raise InputError("nothing was recorded: run the model's forwards within `with ep.record() as record`")
        if rows is not None and len(rows) != len(self._forwards):
            raise InputError(f"rows are for {len(rows)} forwards; {len(self._forwards)} were recorded")
        parts = []
        for forward, chosen in enumerate(self._forwards):
            if len(chosen) != self._num_layers:
                raise InputError(f"forward {forward} ran {len(chosen)} of {self._num_layers} MoE layers")
            ids_TLK = torch.stack(chosen, 1).to(torch.int16).numpy(force=True)
            if rows is not None:
                ids_TLK = _in_rows(ids_TLK, np.asarray(rows[forward]), forward)
            parts.append(ids_TLK)
        offsets = np.cumsum([0, *map(len, parts)])
        layer_ids = tuple(range(self._num_layers))
        trace = RoutingTrace(np.concatenate(parts), offsets, self._num_experts, layer_ids)
        return RoutedBatch(trace, np.arange(len(parts)), len(parts), rows)


def _in_rows(ids_TLK: np.ndarray, rows: np.ndarray, forward: int) -> np.ndarray:
    """What was chosen for each row, in the order of rows."""
    fed = np.flatnonzero(rows >= 0)
    if rows.shape != ids_TLK.shape[:1] or (np.sort(rows[fed]) != np.arange(len(fed))).any():
        raise InputError(
            f"rows of forward {forward} are {rows.shape}; they must name each of 0..n-1 once for {len(ids_TLK)} "
            "tokens, -1 for padding"
        )
    return ids_TLK[fed[np.argsort(rows[fed])]]
