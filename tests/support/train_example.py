"""`examples/train_ep.py` on every rank of a group."""

import importlib.util
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_ep.py"


def example_losses(words: list[str]) -> list[float]:
    """The losses of a run with these arguments."""
    spec = importlib.util.spec_from_file_location("train_ep", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example.train(example.arguments(words))
