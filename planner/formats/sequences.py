"""From what was recorded of each sequence to a trace: what is common to the engines, and the quirks that they share.

An engine records `[rows, L, K]` for a sequence of N tokens, token after token, and never the routing of the last
sampled token, which it did not feed: its row is left out (N - 1 rows) or filled with zeros (N rows). Dense layers
appear as layers of zeros. A row of zeros names expert 0 K times, so with K > 1 it is no routing.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

import numpy as np

from ..errors import FormatError, InputError, ShapeError
from ..trace import RoutingTrace
from ..trace_report import KNOWN, LAST_TOKEN, MASKED, NO_ROUTING, NOT_RECORDED, OUTSIDE, VersionSpan
from ..trace_rules import check_ids, check_num_experts, compact_dtype
from .layers import LayersFound, LayersSeen
from .parts import Decode, Part, missing_layers, parts_of
from .row_positions import LastToken, Placed, placed

_LOG = logging.getLogger(__name__)

Holes = Literal["refuse", "unknown"]
IMPROBABLE = 10**9  # a choice that a token makes once in so many is not taken for one that it made
HOLES: tuple[Holes, ...] = ("refuse", "unknown")
Filler = Callable[[np.ndarray, int], np.ndarray]  # (staged ids, num_experts) -> bool [rows]

Trim = Callable[[list[Part], int, int], list[Part]]  # (parts, tokens, num_experts)


class RecordOptions(TypedDict, total=False):
    """How trainers' helpers read records: `moe_layer_ids` and `holes` of `SequenceOptions`."""

    moe_layer_ids: Sequence[int] | None
    holes: Holes


class SequenceOptions(TypedDict, total=False):
    """What every loader of sequences takes.

    num_tokens:    N of each sequence (prompt and completion). A sequence recorded with another length is refused, since
                   routing that is shifted by one token is wrong without any other sign
    token_ids:     the same from the ids of each sequence
    starts:        the token at which the rows of each sequence begin, or None; a list for a sequence in parts
    masks:         of each sequence, bool [N] or None: tokens that need no routing (False) are no holes
    replay_masks:  of each sequence, bool [N] or None: tokens that must not be replayed (False) become unknown
    moe_layer_ids: the MoE layers among the recorded ones; None takes all but layers of zeros at the beginning
    holes:         what to do with a token that was not recorded: "refuse", or leave it "unknown" in all layers
    first_sequence: what messages call the first sequence, where a batch is loaded in pieces
    """

    num_tokens: Sequence[int] | None
    token_ids: Sequence[Sequence[int]] | None
    starts: Any
    masks: Sequence[Any] | None
    replay_masks: Sequence[Any] | None
    moe_layer_ids: Sequence[int] | None
    holes: Holes
    first_sequence: int


def trace_of_sequences(
    recorded: Iterable[Any],
    num_experts: int,
    *,
    last_token: LastToken,
    decode: Decode = lambda payload, name: payload,
    filler: Filler | None = None,
    trim: Trim | None = None,
    what: str = "routed_experts",
    **options: Unpack[SequenceOptions],
) -> RoutingTrace:
    """A trace of these sequences. A token of which a layer was not recorded is unknown.

    Args:
        recorded: of each sequence what `parts_of` takes. An iterator is read once, and kept in compact form only.
        last_token: which rows there are, see `placed`.
        decode: a payload to its array.
        filler: which rows the engine filled in where it had none; inside of a sequence only where chance cannot be it.
        trim: the parts of a sequence of so many tokens, without padding that is not blank.
        what: how messages call `recorded`.
        options: see `SequenceOptions`.

    Raises: TypeError for an option that there is not; ShapeError, FormatError, InputError, which name `what`, the
        sequence, and the token and layer.
    """
    experts = check_num_experts(num_experts)
    known = SequenceOptions.__annotations__
    if not set(options) <= set(known):
        raise TypeError(f"{min(set(options) - set(known))} is no option of a loader; they are {', '.join(known)}")
    holes, starts = options.get("holes", "refuse"), options.get("starts")
    if holes not in HOLES:
        raise InputError(f"holes is {holes!r}, but must be one of {HOLES}")
    masks = options.get("masks"), options.get("replay_masks")
    per_sequence = {
        "num_tokens": lengths_of(options.get("num_tokens"), options.get("token_ids")),
        "starts": [starts] if isinstance(starts, int | np.integer) else listed("starts", starts),
        "masks": listed("masks", masks[0]),
        "replay_masks": listed("replay_masks", masks[1]),
    }
    seen, sequences, names = LayersSeen(what), [], []
    if not isinstance(recorded, Iterable) or isinstance(recorded, str | bytes | Mapping):
        raise FormatError(f"{what} is {str(recorded)[:40]!r}, but must have an entry for each sequence")
    for index, entry in enumerate(recorded):
        name = f"{what} of sequence {options.get('first_sequence', 0) + index}"
        names.append(name)
        given = {key: _of(key, values, index) for key, values in per_sequence.items()}
        parts = parts_of(entry, decode, name, experts, given["starts"])
        if filler is not None:
            for part in parts:
                _blank_fillers(part.ids, filler, experts, at_end=part is parts[-1])
        if trim is not None and parts and given["num_tokens"] is not None:
            parts = trim(parts, given["num_tokens"], experts)
        sequence = placed(parts, given["num_tokens"], last_token, name)
        for _, ids in sequence.pieces:
            seen.add(ids, name)
        sequences.append(sequence)
    for key, values in per_sequence.items():
        if values is not None and len(values) != len(sequences):
            raise InputError(f"{key} has {len(values)} entries, but {what} has {len(sequences)}")
    if not sequences:
        raise InputError(f"{what} is empty, but must hold at least one sequence")
    found = seen.moe_layers(options.get("moe_layer_ids"))
    if not all(sequence.certain for sequence in sequences):
        said = f"rows of {what} begin at token 0 and end with their sequence: give num_tokens or token_ids to check"
        found = found._replace(assumed=(*found.assumed, said))
    trace = _assembled(sequences, names, found, experts, holes, masks)
    _log(trace)
    return trace


def listed(key: str, values: Any) -> Any:
    """`values`, which must have one for each sequence, or be None. Raises: InputError."""
    if values is None or (
        hasattr(values, "__len__") and hasattr(values, "__getitem__") and not isinstance(values, str | bytes | Mapping)
    ):
        return values
    raise InputError(f"{key} is {str(values)[:40]!r}, but must be a list with one for each sequence")


def lengths_of(num_tokens: Sequence[int] | None, token_ids: Sequence[Sequence[int]] | None) -> list[int] | None:
    """N of each sequence from either; both must agree."""
    try:
        given = None if num_tokens is None else [whole(n) for n in num_tokens]
        lengths = given if token_ids is None else [len(ids) for ids in token_ids]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"num_tokens and token_ids must be a length and a list for each sequence: {error}") from None
    if given is not None and given != lengths:
        raise InputError(f"num_tokens is {given[:8]}, but token_ids have the lengths {lengths[:8] if lengths else []}")
    if lengths is not None and min(lengths, default=0) < 0:
        raise InputError(f"num_tokens is {lengths[:8]}, but must not be negative")
    return lengths


def whole(value: Any) -> int:
    """Raises: TypeError, ValueError, OverflowError where it is no whole number."""
    number = int(value)
    if isinstance(value, str | bytes) or number != value:  # 9.5 must not become 9
        raise ValueError(f"{value!r} is no whole number")
    return number


def _of(key: str, values: Any, index: int) -> Any:
    if values is None:
        return None
    if index >= len(values):
        raise InputError(f"{key} has {len(values)} entries, but there are more sequences")
    return values[index]


def _blank_fillers(ids: np.ndarray, filler: Filler, num_experts: int, at_end: bool) -> None:
    """Make the rows that the engine filled in unrecorded ones, in place."""
    filled = filler(ids, num_experts)
    _, layers, top_k = ids.shape
    if math.perm(num_experts, top_k) ** layers < IMPROBABLE:  # a router may have chosen that
        first = len(ids) - (len(ids) if filled.all() else int(np.argmin(filled[::-1])))
        filled[: first if at_end else None] = False
    ids[filled] = np.iinfo(ids.dtype).max


def _assembled(
    sequences: list[Placed],
    names: list[str],
    found: LayersFound,
    num_experts: int,
    holes: Holes,
    masks: tuple[Sequence[Any] | None, Sequence[Any] | None],
) -> RoutingTrace:
    """The trace. What it is made of is freed on the way."""
    layers = found.layers
    offsets = np.cumsum([0, *(sequence.tokens for sequence in sequences)], dtype=np.int64)
    try:
        reasons = [
            _reasons(sequence, layers, name, *(None if mask is None else mask[index] for mask in masks))
            for index, (sequence, name) in enumerate(zip(sequences, names, strict=True))
        ]
    except MemoryError as error:
        raise InputError(f"{offsets[-1]} tokens do not fit into memory: {error}") from None
    if holes == "refuse":
        for name, codes, sequence in zip(names, reasons, sequences, strict=True):
            _refuse_holes(name, codes, sequence, layers)
    dtype = compact_dtype(num_experts)
    try:
        out = np.empty((int(offsets[-1]), len(layers), found.top_k), dtype)
    except (MemoryError, ValueError) as error:
        raise InputError(f"{offsets[-1]} tokens of {len(layers)} layers do not fit into memory: {error}") from None
    versions: list[VersionSpan] = []
    for index, codes in enumerate(reasons):
        sequence, sequences[index] = sequences[index], None  # type: ignore[call-overload]
        rows = out[offsets[index] : offsets[index + 1]]
        for first, ids in sequence.pieces:
            rows[first : first + len(ids)] = ids[: len(rows) - first, layers]
        rows[codes > KNOWN] = np.iinfo(dtype).max
        check_ids(rows, num_experts, codes > KNOWN, names[index], tuple(layers))
        versions += [VersionSpan(index, *span) for span in sequence.versions]
    codes = np.concatenate(reasons) if reasons else np.zeros(0, np.uint8)
    return RoutingTrace._of_checked(
        out, codes, offsets, num_experts, tuple(layers), tuple(versions), found.dropped, found.assumed
    )


def _reasons(sequence: Placed, layers: list[int], name: str, mask: Any, replay_mask: Any) -> np.ndarray:
    """uint8 [N]: why each token is unknown, 0 where it is known."""
    codes = np.full(sequence.tokens, OUTSIDE, np.uint8)
    for first, ids in sequence.pieces:
        codes[first : first + len(ids)] = np.where(missing_layers(ids[:, layers]).any(1), NOT_RECORDED, KNOWN)
    if (codes > KNOWN).all():
        codes[:] = NO_ROUTING
    if len(codes) and codes[-1] > KNOWN:
        codes[-1] = LAST_TOKEN
    if mask is not None:
        codes[~_checked_mask("masks", mask, len(codes), name) & (codes > LAST_TOKEN)] = MASKED
    if replay_mask is not None:
        codes[~_checked_mask("replay_masks", replay_mask, len(codes), name) & (codes != LAST_TOKEN)] = MASKED
    return codes


def _checked_mask(key: str, value: Any, tokens: int, name: str) -> np.ndarray:
    mask = np.asarray(value(tokens) if callable(value) else value)
    if mask.shape != (tokens,) or mask.dtype.kind not in "biu":
        raise ShapeError(f"{key} of {name} is {mask.dtype} {mask.shape}, but must be bool [{tokens}], one a token")
    return mask.astype(bool)


def _refuse_holes(name: str, codes: np.ndarray, sequence: Placed, layers: list[int]) -> None:
    holes = np.flatnonzero((codes > LAST_TOKEN) & (codes != MASKED))
    if not len(holes):
        return
    token, where = int(holes[0]), ""
    for first, ids in sequence.pieces:
        if first <= token < first + len(ids):
            missing = missing_layers(ids[token - first : token - first + 1, layers])[0]
            where = f" in layers {[layers[i] for i in np.flatnonzero(missing)[:8]]}"
    raise InputError(
        f"{name} has no routing for {len(holes)} tokens, the first is token {token}{where}: padding, or the engine did "
        "not record it; with holes 'unknown' (--holes unknown) such tokens are routed live"
    )


def _log(trace: RoutingTrace) -> None:
    report = trace.report
    lost = sum(report.unknown.values()) - int((trace.reasons == LAST_TOKEN).sum())
    if lost or report.assumed:
        lines = [line for line in report.lines() if not line.endswith("last token of its sequence")]
        _LOG.warning("trace of %d tokens: %s", report.tokens, "; ".join(lines))
    elif report.layers_dropped:
        _LOG.info("layers left out of the trace as dense: %s", report.layers_dropped)
