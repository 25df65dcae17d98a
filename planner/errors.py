"""The one exception family of the library. Every message names the argument or file, its value, and what it must be."""

import difflib
from collections.abc import Iterable


class ReLibraError(Exception):
    """Anything this library refuses or fails at."""


class InputError(ReLibraError, ValueError):
    """An argument has a value that cannot be used."""


class ShapeError(InputError):
    """An array or tensor has the wrong shape, dtype or layout."""


class FormatError(ReLibraError):
    """A file is missing, damaged, or not in the format that it should be in."""


class PlanError(ReLibraError):
    """A plan breaks one of its rules, or was made for something else."""


class PolicyError(ReLibraError):
    """A policy of the caller's own failed, or returned what cannot be a result; `__cause__` is its error."""


class CommunicationError(ReLibraError):
    """A collective failed: a rank died, or did not answer within the process-group timeout."""


def one_of(argument: str, given: str, known: Iterable[str], others: str = "") -> str:
    """The one of `known` that `given` is, in upper or lower case.

    Raises: InputError that names the argument, what was perhaps meant, and all that is known; `others` says what else
    would have been taken.
    """
    names = {name.lower(): name for name in known}
    if given.lower() in names:
        return names[given.lower()]
    begun = [name for name in names if given and name.startswith(given.lower())]
    near = begun or difflib.get_close_matches(given.lower(), names, n=1, cutoff=0.6)
    meant = f" (did you mean {names[near[0]]}?)" if near else ""
    raise InputError(f"{argument} is {given!r}{meant}, but must be one of {', '.join(names.values())}{others}")
