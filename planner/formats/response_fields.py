"""What an engine says beside the ids: where they begin, how long the sequence is, and which policies generated it.

SGLang puts it into `meta_info`, and into `sglext` of an OpenAI-compatible response; vLLM beside the payload.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import FormatError, InputError

STARTS = ("start", "routed_experts_start_len", "routed_experts_prompt_start", "prompt_start")
VERSIONS = ("weight_version", "version")
SPANS = "weight_versions"  # [{"version", "start", "end"}] over the tokens that were generated
LENGTHS = ("prompt_tokens", "completion_tokens")
DTYPE = "routed_experts_dtype"
BESIDE = (*STARTS, *VERSIONS, SPANS, *LENGTHS, DTYPE)
INSIDE = ("meta_info", "sglext")


class Version(NamedTuple):
    """A policy, and which of the generated tokens are its; None, None: all, and the prompt's rows too."""

    first: int | None
    stop: int | None
    name: str


class Said(NamedTuple):
    """What stands beside a payload, None or empty where nothing does. See `Part`."""

    start: int | None = None
    tokens: int | None = None
    versions: tuple[Version, ...] = ()


def fields_of(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """A payload's surroundings, those in `meta_info` and `sglext` too; `entry` itself where it has neither."""
    inside = [entry[key] for key in INSIDE if isinstance(entry.get(key), Mapping)]
    if not inside:
        return entry
    fields = dict(entry)
    for mapping in inside:
        fields.update(mapping)
    return fields


def said_of(fields: Mapping[str, Any], name: str) -> Said:
    """Raises: InputError where it contradicts itself, FormatError where it is of no known form."""
    starts = {key: checked_start(fields[key], name) for key in STARTS if fields.get(key) is not None}
    if len(set(starts.values())) > 1:
        raise InputError(f"{name} says {starts}: they must agree")
    return Said(next(iter(starts.values()), None), _tokens(fields, name), _versions(fields, name))


def checked_start(value: Any, name: str) -> int | None:
    if value is None:
        return None
    start = _count(value)
    if start is None:
        raise InputError(f"start of {name} is {value!r}, but must be the number of a token, from 0 on")
    return start


def _tokens(fields: Mapping[str, Any], name: str) -> int | None:
    said = [fields.get(key) for key in LENGTHS]
    if None in said:
        return None
    counts = [_count(value) for value in said]
    if None in counts:
        raise FormatError(f"{name} says {dict(zip(LENGTHS, said, strict=True))}, but they must be numbers of tokens")
    return sum(count or 0 for count in counts)


def _versions(fields: Mapping[str, Any], name: str) -> tuple[Version, ...]:
    spans = fields.get(SPANS)
    if not spans:
        one = next((str(fields[key]) for key in VERSIONS if fields.get(key) is not None), None)
        return () if one is None else (Version(None, None, one),)
    found: list[Version] = []
    for span in spans if isinstance(spans, Sequence) and not isinstance(spans, str) else [spans]:
        first, stop, version = (
            (_count(span.get("start")), _count(span.get("end")), span.get("version"))
            if isinstance(span, Mapping)
            else (None, None, None)
        )
        begin = found[-1].stop if found else 0
        if first is None or stop is None or version is None or first != begin or stop < first:
            raise FormatError(
                f"{name} has the {SPANS} {str(spans)[:80]}, but they must be {{version, start, end}} of the generated "
                "tokens, each where the one before ends"
            )
        found.append(Version(first, stop, str(version)))
    return tuple(found)


def _count(value: Any) -> int | None:
    """A whole number from 0 on, or None."""
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):  # torch raises the latter
        return None
    return count if count >= 0 else None
