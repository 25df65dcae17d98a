"""Versions of packages, without importing them."""

import importlib.metadata
import re
from functools import cache


@cache
def version_of(package: str) -> tuple[int, ...]:
    """(major, minor); empty where the package is not installed."""
    try:
        return tuple(int(digits) for digits in re.findall(r"\d+", importlib.metadata.version(package))[:2])
    except importlib.metadata.PackageNotFoundError:
        return ()
