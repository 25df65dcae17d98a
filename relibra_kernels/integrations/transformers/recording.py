"""Recording the routing of a Hugging Face model, in `generate` and in plain forwards, as a trace."""

import logging
import math
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...planner import RoutingTrace
from ...planner.errors import InputError
from ...planner.trace_rules import compact_dtype
from .fed_sequence import FedSequence
from .fed_tokens import CachedColumns, Fed, cache_of, fed_tokens
from .moe_layers import MoeLayer, model_inside, moe_layers, not_compiled

_LOG = logging.getLogger(__name__)


class RoutingRecord:
    """What `record_routing` saw: `trace()` makes a trace of it."""

    def __init__(self, layers: list[MoeLayer], eos_token_ids: Sequence[int]):
        self._layers, self._eos = layers, np.asarray(eos_token_ids, np.int64)
        self._sequences: list[FedSequence] = []
        self._open: list[FedSequence] = []  # of the batch whose cache grows
        self._cache: Any = None  # of that batch
        self._columns = CachedColumns()  # of that cache
        self._moved = False  # whether rows changed places in a cache
        self._fed: Fed | None = None
        self._chosen: list[Tensor | None] = []

    def trace(self, token_ids: Sequence[Sequence[int]] | None = None) -> RoutingTrace:
        """A trace of the recorded sequences: batch by batch, row by row.

        A plain forward is a whole sequence a row, or several that are packed in one (`cu_seq_lens_q` or `position_ids`
        say where they begin); so is every step of `generate` without a cache. With one, the last sampled token was
        never fed and is unknown, and what was fed after the first end-of-sequence token is left out; so is what was
        taken out of the cache again (`crop`), as drafts that were not chosen are. ERNIE-VL's image tokens go to experts
        of their own, and are unknown.

        Args:
            token_ids: of every sequence, without padding, as `generate` returned them: they say how long sequences
                are, and recorded routing that was not theirs is refused. Needed where beams changed places. Padding
                behind packed sequences is left out; without them, so are sequences of one token at the end of a packed
                row, with a warning.

        Raises: InputError where nothing was recorded, or the ids are not what was fed.
        """
        if not self._sequences:
            raise InputError("nothing was recorded: run the model inside of `with record_routing(model)`")
        self._cut_to_cache(token_ids is not None)
        sequences = self._told_from_padding(None if token_ids is None else len(token_ids))
        num_experts = self._layers[0].num_experts
        parts, unknown = [], []
        for index, sequence in enumerate(sequences):
            rows = np.concatenate(sequence.expert_ids)
            if token_ids is None:
                length = sequence.length(self._eos)
            else:
                length = sequence.checked_length(index, np.asarray(token_ids[index], np.int64))
            rows = rows[:length]
            parts += [rows, np.zeros((length - len(rows), *rows.shape[1:]), rows.dtype)]
            unknown += [~np.concatenate(sequence.known)[:length], np.ones(length - len(rows), bool)]
        lengths = [len(parts[i]) + len(parts[i + 1]) for i in range(0, len(parts), 2)]
        return RoutingTrace(
            np.concatenate(parts),
            np.cumsum([0, *lengths]),
            num_experts,
            tuple(layer.layer_id for layer in self._layers),
            unknown=np.concatenate(unknown),
        )

    def _told_from_padding(self, wanted: int | None) -> list[FedSequence]:
        """The sequences without those of one token at the end of a packed row, which padding looks like.

        Args:
            wanted: how many sequences there are, where `token_ids` says so: all of them stay if it says that many.
        """
        surely = [sequence for sequence in self._sequences if not sequence.perhaps_padding]
        left_out = len(self._sequences) - len(surely)
        if wanted == len(self._sequences):
            return self._sequences
        if wanted is not None and wanted != len(surely):
            raise InputError(f"token_ids has {wanted} sequences, but {len(self._sequences)} were recorded")
        if wanted is None and left_out:
            _LOG.warning(
                "%d sequences of one token at the end of packed rows are taken for padding: token_ids says which are",
                left_out,
            )
        return surely

    def _begin(self, fed: Fed) -> None:
        self._fed, self._chosen = fed, [None] * len(self._layers)

    def _choose(self, layer: int, top_k_index: Tensor, top_k_weights: Tensor | None) -> None:
        if self._fed is None:  # a block runs again for its backward
            return
        router = self._layers[layer].router
        if hasattr(router, "num_router_classes") and top_k_weights is not None:  # ZAYA shows a skip as expert 0
            skipped = top_k_weights == 0
            top_k_index = top_k_index.masked_fill(skipped, router.num_router_classes - 1)  # type: ignore[operator]
        self._chosen[layer] = top_k_index.detach()

    def _end(self, outputs: Any) -> None:
        fed, self._fed = self._fed, None
        if fed is None:
            return
        chosen = []
        known = np.ones(fed.real.size, bool) if fed.elsewhere is None else ~fed.elsewhere.reshape(-1)
        count = int(known.sum())
        for layer, top_k_index in zip(self._layers, self._chosen, strict=True):
            if top_k_index is None or len(top_k_index) != count:
                rows = "did not run" if top_k_index is None else f"ran {len(top_k_index)} of {count} tokens"
                raise InputError(f"{layer.name} {rows} in this forward, so that its routing is not known{layer.part}")
            chosen.append(top_k_index)
        ids_TLK = torch.stack([ids.to(chosen[0].device) for ids in chosen], 1).to(torch.int32).numpy(force=True)
        dtype = compact_dtype(self._layers[0].num_experts)
        rows_TLK = np.full((len(known), *ids_TLK.shape[1:]), np.iinfo(dtype).max, dtype)
        rows_TLK[known] = ids_TLK
        if fed.packed is not None:
            self._add_packed(fed, fed.packed, rows_TLK, known)
            return
        ids_BSLK, known_BS = rows_TLK.reshape(*fed.real.shape, *ids_TLK.shape[1:]), known.reshape(fed.real.shape)
        if not fed.cached:
            self._columns = CachedColumns()
            self._open = [FedSequence(sampled=fed.cached is not None) for _ in fed.real]
            self._sequences += self._open
        elif fed.cache is not self._cache or len(fed.real) != len(self._open):
            raise InputError(
                f"the cache holds {fed.cached} tokens of {len(fed.real)} sequences whose routing was not recorded: "
                "begin recording before the first of them is fed"
            )
        elif fed.cached < self._columns.count:
            self._cut(fed.cached)
        self._follow(fed.cache if fed.cache is not None else cache_of(outputs))
        self._columns.add(fed.real)
        for b, sequence in enumerate(self._open):
            sequence.sampled |= bool(fed.cached)
            real = fed.real[b]
            token_ids = None if fed.token_ids is None else fed.token_ids[b, real]
            sequence.add(token_ids, ids_BSLK[b, real], known_BS[b, real])

    def _cut(self, columns: int) -> None:
        """The last tokens were taken out of the cache: those that a draft proposed and the model did not choose."""
        for sequence, rows in zip(self._open, self._columns.cut(columns), strict=True):
            sequence.cut(int(rows))

    def _cut_to_cache(self, token_ids_given: bool) -> None:
        if self._moved and not token_ids_given:
            raise InputError(
                "beams changed places while they were recorded: only token_ids says which of them `generate` returned"
            )
        columns = 0 if self._cache is None else int(self._cache.get_seq_length())
        if 0 < columns < self._columns.count:
            self._cut(columns)

    def _follow(self, cache: Any) -> None:
        """Have the sequences change places with the rows of this cache, and no longer with those of the last one."""
        if cache is self._cache:
            return
        if self._cache is not None:
            vars(self._cache).pop("reorder_cache", None)
        self._cache, self._columns = cache, self._columns if cache is not None else CachedColumns()
        before = getattr(getattr(cache, "reorder_cache", None), "__func__", None)
        if before is None:
            return

        def reorder_cache(this: Any, beam_idx: Tensor) -> None:
            before(this, beam_idx)
            if this is self._cache:  # and no copy of it
                self._move(beam_idx.numpy(force=True))

        cache.reorder_cache = types.MethodType(reorder_cache, cache)

    def _move(self, rows: np.ndarray) -> None:
        self._moved |= bool((rows != np.arange(len(rows))).any())
        self._open = [self._open[row].copy() for row in rows]
        self._sequences[-len(rows) :] = self._open
        self._columns.select(rows)

    def _close(self) -> None:
        """Follow the cache no further; what it holds now counts."""
        if self._sequences:
            self._cut_to_cache(True)
        self._follow(None)

    def _add_packed(self, fed: Fed, packed: tuple[int, ...], ids_TLK: np.ndarray, known_T: np.ndarray) -> None:
        """A sequence for each of those that one row is packed of, without padding behind them."""
        lengths = list(packed)
        if fed.padded_behind:
            lengths.pop()
        surely = len(lengths)
        while not fed.padded_behind and surely > 1 and lengths[surely - 1] == 1:  # padding, if all its positions are 0
            surely -= 1
        place, most = 0, math.gcd(*lengths[:surely]) - 1
        for index, length in enumerate(lengths):
            own = slice(place, place + length)
            token_ids = None if fed.token_ids is None else fed.token_ids[0, own]
            alone = index >= surely
            sequence = FedSequence(False, alone, 0 if alone else most, [token_ids], [ids_TLK[own]], [known_T[own]])
            self._sequences.append(sequence)
            place += length
        self._follow(None)
        self._open = []


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record which experts every token of every forward of `model` goes to; also inside of `model.generate`.

    with record_routing(model) as record:
        out = model.generate(prompts)
    trace = record.trace()

    `model` may be wrapped (PEFT, DDP, FSDP, torch.compile, which runs uncompiled within).
    """
    layers = moe_layers(model)
    record, inside = RoutingRecord(layers, _eos_token_ids(model_inside(model))), model_inside(model)
    hooks = [
        inside.register_forward_pre_hook(
            lambda _, args, kwargs: record._begin(fed_tokens(args, kwargs)), with_kwargs=True
        ),
        inside.register_forward_hook(lambda _, args, outputs: record._end(outputs)),
    ]

    def choose(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = args[1] if len(args) > 1 else kwargs["top_k_index"]
            record._choose(layer, index, args[2] if len(args) > 2 else kwargs.get("top_k_weights"))

        return hook

    hooks += [
        layer.experts.register_forward_pre_hook(choose(index), with_kwargs=True) for index, layer in enumerate(layers)
    ]
    try:
        with not_compiled(model):
            yield record
    finally:
        for hook in hooks:
            hook.remove()
        record._close()


def _eos_token_ids(model: nn.Module) -> list[int]:
    config: Any = getattr(model, "generation_config", None) or getattr(model, "config", None)
    eos = getattr(config, "eos_token_id", None)
    return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [int(eos)]
