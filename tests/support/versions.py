"""Versions of what is installed, for tests of what only some of them have."""

import importlib.metadata
import re


def version_of(package: str) -> tuple[int, ...]:
    """Of 2.13.0+cpu: (2, 13); () where it is not installed."""
    try:
        text = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(digits) for digits in re.findall(r"\d+", text)[:2])


TORCH, TRANSFORMERS = version_of("torch"), version_of("transformers")
