"""One open batch on one rank: its plan, its tables, its replicas; and what it reports when it is over."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..nn import ReplicatedMoE
from ..planner import BatchPlan
from ..planner.errors import InputError
from ..weights import ExpertWeights
from .comm.groups import Groups
from .experts.kept import KeptReplicas, replicas_to_keep
from .experts.replicas import ReplicaPushes
from .microbatch import BatchParts, MicroBatch, Record
from .routed_batch import RoutedBatch
from .session import Session
from .tokens.buffers import Buffers
from .tokens.paths import reserve
from .tokens.tables import Tables


class OpenBatch:
    """Made once the experts are at their homes. Making it fetches the kept replicas: collective."""

    def __init__(
        self,
        session: Session,
        groups: Groups,
        plan: BatchPlan,
        loads_LMRE: np.ndarray,
        batch: RoutedBatch,
        layers: Sequence[ReplicatedMoE],
        buffers: Buffers,
    ):
        self.plan, self._layers, self._groups, self._session, self._loads = plan, layers, groups, session, loads_LMRE
        comm = self._comm = groups.experts
        self.device = layers[0].experts.gate_up_proj.device

        def weights_of(layer: int) -> ExpertWeights:
            return layers[layer].experts.weights

        each = [_expert_bytes(weights_of(layer)) for layer in range(len(layers))]
        kept = replicas_to_keep(plan, each, session.options.kept_bytes)
        with session.ledger.span("replica", self.device):
            self._kept = KeptReplicas(comm, plan, weights_of, kept)
        pushes = ReplicaPushes(groups.side, weights_of, self._kept.weights)
        self._parts = BatchParts(session, comm, plan, pushes, self._kept, buffers, self.device)
        self._tables = Tables(comm, plan, loads_LMRE, batch.trace, batch.micro_batch_of_sequence, self.device)
        self._rows = batch.rows
        self._records: dict[int, list[Record]] = {}

    def micro_batch(self, index: int, rows: np.ndarray | None) -> MicroBatch:
        """Open a micro-batch: collective.

        Raises: InputError where the plan has none of this index.
        """
        count = self.plan.num_micro_batches
        if not isinstance(index, int | np.integer) or not 0 <= index < count:
            raise InputError(f"index is {index!r}; the plan has micro-batches 0..{count - 1}")
        index = int(index)
        rows = self._rows[index] if rows is None and self._rows is not None else rows
        parts = self._parts
        with self._session.ledger.span("tables", self.device):
            tables = self._tables.get(index)
            experts = [moe.experts for moe in self._layers]
            reserve(parts.buffers, tables, parts.comm.rank, experts, self._session.options, self.device)
            micro_batch = MicroBatch(parts, tables, index, rows)
        self._records.setdefault(index, []).append(micro_batch.record)
        return micro_batch

    def finish(self) -> None:
        """Kept replicas' gradients go home; routing that left what was recorded is refused. Collective.

        Raises: InputError where more tokens chose other experts than `spare_rows` has room for: their gradients are
            missing.
        """
        self._parts.pushes.finish()
        with self._session.ledger.span("replica", self.device):
            self._kept.give_back(self._gradients_of)
        spare, problem = self._session.options.spare_rows, None
        worst = max((int(record.differing.max()) for seen in self._records.values() for record in seen), default=0)
        if worst > spare:
            problem = InputError(
                f"{worst} tokens of one layer and micro-batch were routed to other experts than recorded; spare_rows "
                f"is {spare}, so their experts did not compute them: replay the recorded routing, or raise spare_rows"
            )
        self._groups.agree(problem, {}, self.device, "closing the batch")

    def close(self) -> None:
        """Nothing of this batch runs from here on."""
        self._session.is_open = False
        self._tables.close()
        self._parts.pushes.close()
        self._kept.close()

    def stats(self) -> dict[str, Any]:
        """What the batch did, over the group. Collective. Also after the batch is closed."""
        plan, ledger, device = self.plan, self._session.ledger, self.device
        shape = (plan.num_layers, plan.num_micro_batches)
        actual = np.full(shape, -1, np.int64)
        unknown = differing = 0
        for index, seen in self._records.items():
            actual[:, index] = np.maximum.reduce([record.loads for record in seen])
            unknown += seen[-1].num_live
            differing += int(torch.stack([record.differing for record in seen]).max(0).values.sum())
        loads = self._comm.gather_arrays(np.append(actual, [unknown, differing]), device, "gathering the statistics")
        actual_RLM = loads[:, :-2].reshape(-1, *shape)
        ran = np.asarray((actual_RLM >= 0).all(0))
        sent = ledger.batch_bytes()
        kinds = sorted({kind for kind, _ in sent})
        return {
            "rank": self._comm.rank,
            "planned_max_mean": _max_mean(plan.rank_loads(self._loads).transpose(2, 0, 1), ran),
            "actual_max_mean": _max_mean(actual_RLM, ran),
            "layers_run": int(ran.sum()),
            "unknown_tokens": int(loads[:, -2].sum()),
            "differing_tokens": int(loads[:, -1].sum()),
            "replicas": int((plan.replicas >= 0).sum()),
            "replicas_kept": int(self._kept.kept_LRS.sum()),
            "seconds": ledger.seconds(),
            "bytes": {kind: {net: sent.get((kind, net), 0) for net in ("fast", "slow")} for kind in kinds},
        }

    def _gradients_of(self, layer: int) -> ExpertWeights:
        def of(parameter: Tensor) -> Tensor | None:
            main_grad: Tensor | None = getattr(parameter, "main_grad", None)
            return (parameter.grad if main_grad is None else main_grad) if parameter.requires_grad else None

        return self._layers[layer].experts.weights.map(of)


def _max_mean(loads_RLM: np.ndarray, ran_LM: np.ndarray) -> float:
    """Mean over the (layer, micro-batch) pairs that ran and have load; 1 where there is none."""
    mean = loads_RLM.mean(0)
    used = ran_LM & (mean > 0)
    return float((loads_RLM.max(0)[used] / mean[used]).mean()) if used.any() else 1.0


def _expert_bytes(weights: ExpertWeights) -> int:
    """Weights and fp32 gradient of one expert."""
    each = [tensor[0].numel() * (tensor.element_size() + max(4, tensor.element_size())) for tensor in weights.tensors()]
    return sum(each)
