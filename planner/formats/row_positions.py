"""Where the recorded rows of a sequence belong among its tokens: the lengths, the starts, and what is taken as given.

Parts are in the order of time. Where a part begins before the end of an earlier one, the engine generated the sequence
anew from there on, and what earlier parts recorded beyond that token is dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..errors import InputError
from .parts import Part, missing_layers

LastToken = Literal["left out", "in place", "either"]


@dataclass(frozen=True)
class Placed:
    """A sequence of `tokens` tokens, of which `pieces` (first token, staged ids) were recorded.

    certain: a length or a start said so; otherwise the rows are taken to begin at token 0, and to end with the
        sequence.
    """

    tokens: int
    pieces: tuple[tuple[int, np.ndarray], ...]
    versions: tuple[tuple[int, int, str], ...]
    certain: bool


def placed(parts: Sequence[Part], tokens: int | None, last_token: LastToken, name: str) -> Placed:
    """Put the parts of one sequence where they belong.

    Args:
        tokens: N, prompt and completion; None: not known, so that the rows say it.
        last_token: whether the engine has a row for the last token, which it never fed: "left out" (N - 1 rows), "in
            place" (N rows), or "either".

    Raises: InputError where the rows do not fit the tokens.
    """
    if not parts:
        if tokens is None:
            raise InputError(f"{name} is missing, and its length is not known: give num_tokens or token_ids")
        return Placed(tokens, (), (), True)
    parts = _located(parts, last_token, name)
    if tokens is None:
        tokens = parts[-1].tokens
    needed = (
        None
        if tokens is None
        else {"left out": (max(0, tokens - 1),), "in place": (tokens,)}.get(last_token, (max(0, tokens - 1), tokens))
    )
    started = parts[0].start is not None
    certain = tokens is not None or (started and last_token != "either")  # "either": the rows do not say where they end
    if needed and not any(part.start is not None for part in parts) and len(parts) > 1:
        whole = sum(len(part.ids) for part in parts)
        if whole not in needed and len(parts[-1].ids) in needed:
            parts = parts[-1:]  # every turn recorded the whole sequence again
    pieces: list[tuple[int, np.ndarray]] = []
    spans: list[tuple[int, int, str]] = []
    end = 0
    for part in parts:
        at = end if part.start is None else part.start
        if needed and not len(part.ids):
            at = min(at, max(needed))  # nothing was generated after a prompt that was recorded before
        pieces = [(first, ids[: max(0, at - first)]) for first, ids in pieces]
        spans = [(first, min(stop, at), version) for first, stop, version in spans if first < at]
        pieces.append((at, part.ids))
        end = at + len(part.ids)
        spans += _generated(part, at, end, last_token)
    if tokens is None:
        tokens = end + 1 if last_token == "left out" else end
    else:
        assert needed is not None
        if end not in needed:
            pieces, end = _fitted(pieces, end, tokens, needed, last_token, started, name)
    if spans and spans[-1][1] == end:  # the last token was generated with the rows before it
        spans[-1] = (spans[-1][0], tokens, spans[-1][2])
    return Placed(tokens, tuple((at, ids) for at, ids in pieces if len(ids)), tuple(spans), certain)


def _located(parts: Sequence[Part], last_token: LastToken, name: str) -> list[Part]:
    """The parts with their starts, where these follow from lengths that stand beside them: rows end with the last token
    but one.

    Raises: InputError where rows do not end there, or would begin after the end of those before, and nothing says so.
    """
    located: list[Part] = []
    end = 0
    for part in parts:
        if part.tokens is not None and last_token == "left out" and len(part.ids):
            start = part.tokens - 1 - len(part.ids)
            if start < 0 or (start > end if part.start is None else start != part.start):
                begin = end if part.start is None else part.start
                raise InputError(
                    f"{name} has {len(part.ids)} rows from token {begin} on, but says that it has {part.tokens} "
                    f"tokens, which need {part.tokens - 1 - begin}: one for each token but the last; rows that begin "
                    "at a later token are placed with starts"
                )
            part = replace(part, start=start)
        located.append(part)
        end = (end if part.start is None else part.start) + len(part.ids)
    return located


def _generated(part: Part, at: int, end: int, last_token: LastToken) -> list[tuple[int, int, str]]:
    """(first token, stop, policy) of a part whose rows are those of the tokens `at` to `end`; a prompt's rows are
    the first policy's."""
    done = part.tokens or end + (last_token == "left out")  # where the last span ends
    spans: list[tuple[int, int, str]] = []
    for first, stop, name in part.versions:
        if first is None or stop is None:
            spans.append((at, end, name))
            continue
        begin = done - (part.versions[-1].stop or 0)
        first, stop = (max(at, begin + first) if spans else at), begin + stop
        if first < stop:
            spans.append((first, stop, name))
    return spans


def _fitted(
    pieces: list[tuple[int, np.ndarray]],
    end: int,
    tokens: int,
    needed: tuple[int, ...],
    last_token: LastToken,
    started: bool,
    name: str,
) -> tuple[list[tuple[int, np.ndarray]], int]:
    """The pieces where they are cut off at the end: rows of padding too many, or rows that the caller placed.

    Raises: InputError for any other number of rows.
    """
    at, ids = pieces[-1]
    if end > max(needed):
        blank = missing_layers(ids[max(0, tokens - 1 - at) :])
        if at < tokens and blank.all():  # also the last token's own row, so that nothing can be shifted
            return [*pieces[:-1], (at, ids[: tokens - 1 - at])], tokens - 1
    elif started or not sum(len(rows) for _, rows in pieces):
        return pieces, end
    rows = sum(len(piece) for _, piece in pieces)
    meaning = {"left out": "one for each token but the last", "in place": "one for each token"}.get(
        last_token, "one for each token, or for each but the last"
    )
    where = f" from token {pieces[0][0]} on" if pieces[0][0] else ""
    raise InputError(
        f"{name} has {rows} rows{where}, but its {tokens} tokens need {needed[-1]}: {meaning}; rows that begin at a "
        "later token are placed with starts"
    )
