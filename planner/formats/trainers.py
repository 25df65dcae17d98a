"""The trainers' own forms: slime, prime-rl, NeMo-RL. They carry what vLLM or SGLang recorded. For verl see verl.py.

| trainer | form | the last token | where rows are missing |
|---|---|---|---|
| slime | [len(tokens) - 1, layers, K] a sample | left out | -1; `arange % E` as padding, outside the samples |
| prime-rl | {data, shape, start, dtype}, [S, L, K] | left out, or in place as zeros | zeros |
| NeMo-RL | "nrlre1:<dtype>:<S>x<L>x<K>:<base64>" | in place, 0..K-1 in every layer | -1; tool results 0..K-1 |
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import numpy as np

from ..errors import FormatError
from ..trace import RoutingTrace
from .encoded import array_of_bytes, decode_base64, named_dtype
from .parts import Part
from .registry import loader
from .sequences import SequenceOptions, trace_of_sequences


@loader("slime", "a folder of .npy arrays [N-1, L, K], one a sample in name order")
def from_slime(
    rollout_routed_experts: Sequence[Any], num_experts: int, **options: Unpack[SequenceOptions]
) -> RoutingTrace:
    """A trace of slime's samples, `Sample.rollout_routed_experts` each; the last token of each is unknown.

    slime pads with rows of `arange % E`, for the last token and for alignment. Where lengths are given, such rows
    beyond the end of a sample are cut off; any other row too many is refused. Options: see `SequenceOptions`.
    """
    return trace_of_sequences(
        rollout_routed_experts,
        num_experts,
        last_token="left out",
        trim=_without_padding,
        what="rollout_routed_experts",
        **options,
    )


def _without_padding(parts: list[Part], tokens: int, num_experts: int) -> list[Part]:
    """The parts of a sample without the rows beyond its tokens, where those are slime's padding."""
    first = end = 0
    for part in parts:
        first = end if part.start is None else part.start
        end = first + len(part.ids)
    ids, rows = parts[-1].ids, tokens - 1 - first
    if rows < 0:
        return parts
    tail, done = ids[rows:], 0
    while done < len(tail):  # it is appended in one piece or two, and each starts with expert 0
        pattern = np.arange(tail[done:].size).reshape(tail[done:].shape) % num_experts
        alike = (tail[done:] == pattern).all((1, 2))
        matching = len(alike) if alike.all() else int(np.argmin(alike))
        if matching == 0:
            return parts
        done += matching
    return [*parts[:-1], replace(parts[-1], ids=ids[:rows])]


@loader("prime-rl", "JSON lines with `routed_experts`: {data (base64), shape, dtype, start}")
def from_prime_rl(routed_experts: Iterable[Any], num_experts: int, **options: Unpack[SequenceOptions]) -> RoutingTrace:
    """A trace of prime-rl's samples: {"data": bytes (base64 in JSON), "shape": [S, L, K], "dtype", "start"} each.

    `start` is the token that the first row is of. A sample of several turns is a list of payloads. Options: see
    `SequenceOptions`.
    """

    def decode(payload: Any, name: str) -> Any:
        if not isinstance(payload, Mapping):
            if isinstance(payload, str | bytes):
                raise FormatError(f"{name} is {payload[:24]!r}, but must be {{data, shape, dtype}}")
            return payload
        missing = {"data", "shape", "dtype"} - set(payload)
        if missing:
            raise FormatError(f"{name} has no {sorted(missing)[0]!r}, only {sorted(map(str, payload))}")
        sizes = _three_sizes(payload["shape"], name)
        return array_of_bytes(decode_base64(payload["data"], name), named_dtype(payload["dtype"], name), sizes, name)

    return trace_of_sequences(routed_experts, num_experts, last_token="either", decode=decode, **options)


@loader("nemo-rl", "JSON lines with `routed_experts`: 'nrlre1:...'")
def from_nemo_rl(routed_experts: Iterable[Any], num_experts: int, **options: Unpack[SequenceOptions]) -> RoutingTrace:
    """A trace of NeMo-RL's envelopes, one a sequence. Rows of -1 are unknown tokens.

    NeMo-RL fills in 0..K-1 in every layer for the last token, padding, and tool results that no later turn fed. Such
    rows are unknown too: at the end of a sequence always, inside of it where routers could not have chosen so by
    accident. Options: see `SequenceOptions`.
    """

    def decode(payload: Any, name: str) -> Any:
        if payload is not None and not isinstance(payload, str):
            return payload
        parts = payload.split(":", 3) if isinstance(payload, str) else []
        if len(parts) != 4 or parts[0] != "nrlre1":
            raise FormatError(f"{name} starts with {str(payload)[:24]!r}, but must be 'nrlre1:<dtype>:<S>x<L>x<K>:...'")
        sizes = _three_sizes(parts[2].split("x"), name)
        return array_of_bytes(decode_base64(parts[3], name), named_dtype(parts[1], name), sizes, name)

    return trace_of_sequences(
        routed_experts, num_experts, last_token="in place", decode=decode, filler=_counts_up, **options
    )


def _counts_up(staged_TLK: np.ndarray, num_experts: int) -> np.ndarray:
    """bool [rows]: 0..K-1 in every layer."""
    return (staged_TLK == np.arange(staged_TLK.shape[2])).all((1, 2))


def _three_sizes(shape: Any, what: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in shape)
    except (TypeError, ValueError, OverflowError):
        sizes = ()
    if len(sizes) != 3 or min(sizes) < 0 or max(sizes) >= 1 << 40:
        raise FormatError(f"{what} has the shape {shape!r}, but must have three sizes: tokens, layers, k")
    return sizes
