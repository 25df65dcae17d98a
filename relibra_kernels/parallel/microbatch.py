"""One micro-batch as the layers see it: the recorded indices, and a site a layer, made when the layer first runs."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..form import ExpertForm
from ..nn import ReplicatedExperts
from ..planner import BatchPlan
from ..planner.errors import InputError, ShapeError
from .comm.collectives import Comm
from .experts.kept import KeptReplicas
from .experts.replicas import ReplicaPushes, ReplicaRoute, replica_route
from .session import Session
from .tokens.buffers import Buffers
from .tokens.layer import ExpertParallelMLP, LayerSite
from .tokens.live import LiveMLP, LiveSite
from .tokens.paths import PlannedPath
from .tokens.tables import MicroBatchTables


@dataclass(frozen=True)
class BatchParts:
    """What the micro-batches of one batch share.

    `fetch_ahead`: replicas are fetched one layer before they are needed, for which that layer's weights must be there.
    """

    session: Session
    comm: Comm
    plan: BatchPlan
    pushes: ReplicaPushes
    kept: KeptReplicas
    buffers: Buffers
    device: torch.device
    fetch_ahead: bool = True


class Record:
    """What is remembered of a micro-batch when it is over.

    Attributes:
        loads: int64 [L], planned assignments that this rank computed; -1 where the layer has not run.
        differing: int64 [L] on the device, tokens whose experts were not those recorded.
        num_live: tokens of this rank that are routed live.
    """

    def __init__(self, num_layers: int, num_live: int, device: torch.device):
        self.loads = np.full(num_layers, -1, np.int64)
        self.differing = torch.zeros(num_layers, dtype=torch.int64, device=device)
        self.num_live = num_live


class MicroBatch:
    """One micro-batch. It lives as long as a graph needs it.

    Args:
        tables: of this micro-batch.
        rows: int [tokens of the model's input], which row of the micro-batch's trace each token is, -1 for padding;
            None: the model's input is the rows themselves, in trace order.

    Attributes:
        num_tokens: of the model's input.

    Raises: InputError where `rows` leaves out a recorded row, or names one twice.
    """

    def __init__(self, parts: BatchParts, tables: MicroBatchTables, index: int, rows: np.ndarray | None):
        self._parts, self._tables, self.index = parts, tables, index
        num_rows, num_layers, self._top_k = tables.expert_ids.shape
        rows = np.arange(num_rows) if rows is None else np.asarray(rows)
        rows = rows if rows.size else rows.astype(np.int64)  # an empty list has no integers in it
        self._token_of_row = _token_of_row(rows, tables.expert_ids, tables.live, index)
        self.num_tokens = len(rows)
        padding = np.full((1, *tables.expert_ids.shape[1:]), -1, tables.expert_ids.dtype)
        expert_ids = np.concatenate([tables.expert_ids, padding])[rows]  # row -1 is the last one
        self.complete = bool((expert_ids >= 0).all())
        self._recorded = torch.from_numpy(np.ascontiguousarray(expert_ids.transpose(1, 0, 2))).to(parts.device)
        self._indices: dict[int, Tensor] = {}
        self._live_tokens = torch.from_numpy(self._token_of_row[tables.live]).to(parts.device)
        self._sites: dict[int, tuple[LayerSite, LiveSite | None]] = {}
        self._routes: dict[int, ReplicaRoute | None] = {}
        self.record = Record(num_layers, int(tables.live.sum()), parts.device)

    def recorded(self, layer: int) -> tuple[Tensor, bool]:
        """(expert ids int64 [tokens, K], whether none is -1), for the router."""
        if layer not in self._indices:
            self._indices[layer] = self._recorded[layer].long()
        return self._indices[layer], self.complete

    def run(self, layer: int, experts: ReplicatedExperts, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The experts of one layer: [tokens, H]."""
        if len(x_TH) != self.num_tokens:
            raise InputError(
                f"MoE layer {layer} got {len(x_TH)} tokens; the micro-batch's routing is for {self.num_tokens}"
            )
        site, live = self.sites(layer)
        recorded, _ = self.recorded(layer)
        tokens, live_index, planned_TK = self._live_tokens, None, weights_TK
        if index_TK is not recorded:
            differs = (index_TK != recorded).any(1) & (recorded[:, 0] >= 0)
            self.record.differing[layer] += differs.sum()
            planned_TK = weights_TK.masked_fill(differs[:, None], 0.0)
            tokens, live_index = self._pick_live(differs, index_TK)
        x_TH = x_TH.contiguous()
        form: ExpertForm = experts.form
        out = ExpertParallelMLP.apply(x_TH, planned_TK, site, form, experts.recompute, *experts.weights)
        if live is None:
            return out
        if live_index is None:
            live_index = index_TK[tokens]
        missing = live.capacity - len(tokens)
        pad = torch.nn.functional.pad
        x, weights = x_TH[tokens], weights_TK[tokens]
        out_live = LiveMLP.apply(
            pad(x, (0, 0, 0, missing)),
            pad(weights, (0, 0, 0, missing)),
            pad(live_index, (0, 0, 0, missing), value=-1),
            live,
            form,
            *experts.weights,
        )
        return out.index_add(0, tokens, out_live[: len(tokens)])

    def sites(self, layer: int) -> tuple[LayerSite, LiveSite | None]:
        """What a layer needs for its recorded rows, and for those that are routed live, where any rank has some."""
        if layer not in self._sites:
            self._sites[layer] = self._make_site(layer), self._make_live_site(layer)
            self.record.loads[layer] = self._sites[layer][0].path.assignments
        return self._sites[layer]

    def route(self, layer: int) -> ReplicaRoute | None:
        """The replicas of a layer on this rank; None outside of the model."""
        parts, kept = self._parts, self._parts.kept
        if not 0 <= layer < parts.plan.num_layers:
            return None
        if layer not in self._routes:
            stay = kept.kept_LRS[layer], kept.transfers(layer)
            self._routes[layer] = replica_route(parts.plan, layer, self.index, parts.comm.rank, *stay)
        return self._routes[layer]

    def _make_site(self, layer: int) -> LayerSite:
        parts, tables = self._parts, self._tables
        replicas = self.route(layer)
        where = f"layer {layer}, micro-batch {self.index}"
        path = PlannedPath(
            parts.comm,
            parts.buffers,
            tables.routes[layer],
            tables.receive_counts[layer],
            tables.received_slots[layer],
            self._token_of_row,
            self.num_tokens,
            parts.plan.experts_per_rank + (parts.plan.num_slots if replicas else 0),
            parts.device,
            where,
            parts.session.options.overlap,
        )
        return LayerSite(
            session=parts.session,
            layer=layer,
            micro_batch=self.index,
            tag=self._tag(layer),
            path=path,
            pushes=parts.pushes,
            kept=parts.kept,
            replicas=replicas,
            weight_of_slot=torch.from_numpy(replicas.weight_of_slot).to(parts.device) if replicas else None,
            next_routes=(self.route(layer - 1), self.route(layer + 1)) if parts.fetch_ahead else (None, None),
        )

    def _make_live_site(self, layer: int) -> LiveSite | None:
        parts, plan = self._parts, self._parts.plan
        capacity = int(self._tables.live_counts.max()) + parts.session.options.spare_rows
        if capacity == 0:
            return None
        slot_of_expert = np.full(plan.num_experts + 1, -1, np.int64)
        slot_of_expert[plan.home_experts(layer)[parts.comm.rank]] = np.arange(plan.experts_per_rank)
        return LiveSite(
            session=parts.session,
            comm=parts.comm,
            tag=self._tag(layer),
            capacity=capacity,
            slot_of_expert=torch.from_numpy(slot_of_expert).to(parts.device),
            num_slots=plan.experts_per_rank,
            where=f"layer {layer}, micro-batch {self.index}",
        )

    def _tag(self, layer: int) -> Tensor:
        return torch.tensor([self._parts.session.serial, self.index, layer])

    def _pick_live(self, differs_T: Tensor, index_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The live tokens and, as far as there is room, those that differ: (tokens, their experts; -1: no row)."""
        spare = min(self._parts.session.options.spare_rows, self.num_tokens)
        chosen = torch.argsort(differs_T, descending=True, stable=True)[:spare]
        index = torch.where(differs_T[chosen, None], index_TK[chosen], -1)
        return torch.cat([self._live_tokens, chosen]), torch.cat([index_TK[self._live_tokens], index])


def _token_of_row(rows: np.ndarray, expert_ids: np.ndarray, live: np.ndarray, micro_batch: int) -> np.ndarray:
    """Position in the model's input of every row of the trace, -1 where an unrecorded row is left out."""
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ShapeError(
            f"rows is {rows.dtype} {rows.shape}; it must be a vector of integers, one for each input token"
        )
    if rows.size and not -1 <= rows.min() <= rows.max() < len(expert_ids):
        raise InputError(
            f"rows of micro-batch {micro_batch} span {rows.min()}..{rows.max()}; its trace has the rows "
            f"0..{len(expert_ids) - 1} (-1: padding)"
        )
    tokens = np.flatnonzero(rows >= 0)
    times = np.bincount(rows[tokens], minlength=len(expert_ids))
    needed = (expert_ids[:, 0, 0] >= 0) | live
    wrong = np.flatnonzero((times > 1) | ((times == 0) & needed))
    if len(wrong):
        raise InputError(
            f"rows of micro-batch {micro_batch} name row {wrong[0]} {times[wrong[0]]} times; no row may be named "
            "twice, and every row but last tokens must be in the model's input"
        )
    token_of_row = np.full(len(expert_ids), -1, np.int64)
    token_of_row[rows[tokens]] = tokens
    return token_of_row
