"""One micro-batch as the layers see it: the recorded ids, and a `LayerSite` for each layer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..alignment import LAYERS, Alignment
from ..planner import BatchPlan
from ..planner.errors import InputError, ShapeError
from .ahead import MicroBatchTables
from .comm.devices import upload
from .comm.groups import Groups
from .experts.accumulation import GradientSums
from .experts.kept import KeptReplicas
from .experts.replicas import ReplicaPushes, ReplicaRoutes
from .session import Session
from .tokens.arrivals import Arrivals
from .tokens.destinations import Destinations, Placements
from .tokens.layer import Experts, LayerSite, run_layer
from .tokens.live import live_path
from .tokens.transport import TokenPath, Transport


@dataclass(frozen=True)
class BatchParts:
    """What the micro-batches of one batch share.

    `alignment`: compares the record with what routers would choose, in the first micro-batch that says enough.
    `rows`: (elements, dtype) of a token's row in every layer. None: weights are there only while their layer runs;
        else replicas are fetched one layer before they are needed.
    """

    session: Session
    groups: Groups
    plan: BatchPlan
    placements: Placements
    pushes: ReplicaPushes
    kept: KeptReplicas
    routes: ReplicaRoutes
    sums: GradientSums
    transport: Transport
    device: torch.device
    alignment: Alignment
    rows: Sequence[tuple[int, torch.dtype]] | None


class Record:
    """What is remembered of a micro-batch when it is over.

    Attributes:
        loads: int64 [L], assignments that this rank computed; -1 where the layer has not run.
        differing: int64 [L] on the device, tokens whose experts were not those recorded.
        num_live: tokens of this rank that are routed live.
    """

    def __init__(self, num_layers: int, num_live: int, device: torch.device):
        self.loads = np.full(num_layers, -1, np.int64)
        self.differing = torch.zeros(num_layers, dtype=torch.int64, device=device)
        self.num_live = num_live


class AnyMicroBatch(ABC):
    """What a micro-batch is to the layers, recorded or not. It lives as long as a graph needs it.

    Attributes:
        index: in the plan. record: what is remembered of it. timed: whether its layers are.
    """

    def __init__(self, parts: BatchParts, index: int, num_live: int):
        self._parts, self.index = parts, index
        self.timed = parts.session.times(index, parts.plan.num_micro_batches)
        self.record = Record(parts.plan.num_layers, num_live, parts.device)

    @abstractmethod
    def recorded(self, layer: int) -> tuple[Tensor, bool] | None:
        """(expert ids int64 [tokens, K], whether none is -1), for the router; None: it chooses."""

    def alignment(self, layer: int) -> Alignment | None:
        """What compares the router's own choice with the record; None where they are not compared."""
        return None

    @abstractmethod
    def run(self, layer: int, experts: Experts, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The experts of one layer: [tokens, H]."""

    def _run(self, site: LayerSite, experts: Experts, x_TH: Tensor, weights_TK: Tensor) -> Tensor:
        self.record.loads[site.layer] = site.path.assignments
        return run_layer(x_TH, weights_TK, site, experts)

    def _where(self, layer: int) -> str:
        return f"layer {layer}, micro-batch {self.index}"

    def _num_slots(self, layer: int) -> int:
        plan = self._parts.plan
        return plan.home_slots + (plan.num_slots if self._parts.routes.of(layer, self.index) else 0)

    def _live_site(self, layer: int, destinations: Destinations) -> LayerSite:
        """A layer whose destinations are known only now: counts are exchanged. Collective."""
        parts = self._parts
        overlap = parts.session.options.overlap
        with parts.session.ledger.layer_span("live", parts.device, self.timed):
            path = live_path(parts.transport, destinations, self._num_slots(layer), self._where(layer), overlap)
        return self._site_of(layer, path)

    def _site_of(self, layer: int, path: TokenPath) -> LayerSite:
        parts, m = self._parts, self.index
        replicas = parts.routes.of(layer, m)
        beside = parts.routes.of(layer - 1, m), parts.routes.of(layer + 1, m)
        return LayerSite(
            session=parts.session,
            layer=layer,
            micro_batch=m,
            tag=torch.tensor([parts.session.serial, m, layer]),
            path=path,
            pushes=parts.pushes,
            kept=parts.kept,
            replicas=replicas,
            weight_of_slot=replicas.weight_of_slot if replicas else None,
            next_routes=beside if parts.rows else (None, None),
            device=parts.device,
            sums=parts.sums,
            timed=self.timed,
        )


class UnrecordedMicroBatch(AnyMicroBatch):
    """A micro-batch of which no routing is known.

    Every layer exchanges its counts. An expert's home and its replicas share its tokens alike.
    """

    def __init__(self, parts: BatchParts, index: int):
        super().__init__(parts, index, 0)

    def recorded(self, layer: int) -> None:
        return None

    def run(self, layer: int, experts: Experts, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        self.record.num_live = len(x_TH)
        site = self._live_site(layer, self._parts.placements.share(index_TK, layer, self.index))
        return self._run(site, experts, x_TH, weights_TK)


class MicroBatch(AnyMicroBatch):
    """A micro-batch whose routing is recorded.

    Args:
        tables: of this micro-batch.
        rows: int [tokens of the model's input], which row of the micro-batch's trace each token is, -1 for padding;
            None: the model's input is the rows themselves, in trace order.

    Attributes:
        num_tokens: of the model's input.
        complete: whether every token's experts are recorded.
    """

    def __init__(self, parts: BatchParts, tables: MicroBatchTables, index: int, rows: np.ndarray | None):
        prepared = tables.prepared
        super().__init__(parts, index, prepared.num_live)
        self._sizes, send = tables.sizes, prepared.send
        ids_LTK, live, destinations = prepared.expert_ids, prepared.live, prepared.destinations
        self.complete = prepared.num_unknown == 0
        if rows is not None:
            rows_T, token_of_row = (upload(array, parts.device) for array in _both_ways(rows, ids_LTK.shape[1]))
            send = send.of_tokens(rows_T, token_of_row)
            ids_LTK = _by_token(ids_LTK, rows_T)
            live = torch.cat([live, live.new_zeros(1)])[rows_T]
            destinations = Destinations(*(_by_token(table, rows_T) for table in destinations))
            self.complete = self.complete and bool((rows >= 0).all())
        self._live, self._destinations, self._send = live, destinations, send
        self._recorded: list[Tensor] = list(ids_LTK.unbind(0))
        self.num_tokens = ids_LTK.shape[1]
        self._takes_live = tables.takes_live
        self._sites = [] if self._takes_live else self._sites_of_layers(tables.arrivals)

    def recorded(self, layer: int) -> tuple[Tensor, bool]:
        return self._recorded[layer], self.complete

    def alignment(self, layer: int) -> Alignment | None:
        alignment = self._parts.alignment
        return alignment if layer < LAYERS and alignment.wanted else None

    def run(self, layer: int, experts: Experts, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if len(x_TH) != self.num_tokens:
            raise InputError(
                f"MoE layer {layer} got {len(x_TH)} tokens; the micro-batch's routing is for {self.num_tokens}"
            )
        recorded, live = self._recorded[layer], self._live
        if index_TK is not recorded:
            differs = (index_TK != recorded).any(1) & (recorded[:, 0] >= 0)
            self.record.differing[layer] += differs.sum()
            live = live | differs
            if not self._takes_live:  # counted, and refused when the batch closes
                weights_TK = weights_TK.masked_fill(differs[:, None], 0.0)
        if self._takes_live:
            site = self._live_site(layer, self._mixed(layer, index_TK, live))
            return self._run(site, experts, x_TH, weights_TK)
        return self._run(self._sites[layer], experts, x_TH, weights_TK)

    def _sites_of_layers(self, arrivals: Sequence[Arrivals]) -> list[LayerSite]:
        """The site of every layer, where all rows are recorded."""
        parts, options, sites = self._parts, self._parts.session.options, []
        tables = self._send.of_layers([sizes.hops[0] for sizes in self._sizes])
        for layer, (sent, sizes, come) in enumerate(zip(tables, self._sizes, arrivals, strict=True)):
            slots, where = self._num_slots(layer), self._where(layer)
            path = parts.transport.path(sent, sizes, slots, where, options.overlap, come)
            if parts.rows:
                hidden, dtype = parts.rows[layer]
                path.prepare(hidden, dtype, options.combine_dtype or dtype)
            sites.append(self._site_of(layer, path))
        return sites

    def _mixed(self, layer: int, index_TK: Tensor, live_T: Tensor) -> Destinations:
        """Recorded tokens go where the plan has them; live ones are shared out over homes and replicas."""
        live_TK = live_T[:, None]
        shared = self._parts.placements.share(index_TK.masked_fill(~live_TK, -1), layer, self.index)
        pairs = zip(shared, self._destinations, strict=True)
        return Destinations(*(torch.where(live_TK, new, planned[layer]) for new, planned in pairs))


def check_input_rows(rows: np.ndarray, num_rows: int, needed: np.ndarray, micro_batch: int) -> None:
    """Refuse rows of a model's input that leave out a row that is needed, or name one twice.

    Args:
        rows: [tokens of the model's input], -1 for padding. needed: bool [num_rows].
    """
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ShapeError(
            f"rows is {rows.dtype} {rows.shape}; it must be a vector of integers, one for each input token"
        )
    if rows.size and not -1 <= rows.min() <= rows.max() < num_rows:
        raise InputError(
            f"rows of micro-batch {micro_batch} span {rows.min()}..{rows.max()}; its trace has the rows "
            f"0..{num_rows - 1} (-1: padding)"
        )
    times = np.bincount(rows[rows >= 0], minlength=num_rows)
    wrong = np.flatnonzero((times > 1) | ((times == 0) & needed))
    if len(wrong):
        raise InputError(
            f"rows of micro-batch {micro_batch} name row {wrong[0]} {times[wrong[0]]} times; no row may be named "
            "twice, and every row but last tokens must be in the model's input"
        )


def _both_ways(rows: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """int64: the row of each token, -1 for padding; and the token of each row and of -1, -1 where there is none."""
    tokens = np.flatnonzero(rows >= 0)
    token_of_row = np.full(num_rows + 1, -1, np.int64)
    token_of_row[rows[tokens]] = tokens
    return rows.astype(np.int64), token_of_row


def _by_token(table_LNK: Tensor, rows_T: Tensor) -> Tensor:
    """[L, rows, K] -> [L, tokens, K], -1 where the row is -1."""
    last = table_LNK.new_full((len(table_LNK), 1, table_LNK.shape[2]), -1)
    return torch.cat([table_LNK, last], 1)[:, rows_T].contiguous()
