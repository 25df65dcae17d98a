"""How far a long task is: a bar of tqdm in terminals and notebooks, a line now and then in logs.

tqdm is optional: without it a terminal gets a plain line that counts.
"""

import sys
import time
from types import TracebackType
from typing import Any

_LOG_SECONDS = 30.0  # between lines in a log: a task that takes less leaves none


class Progress:
    """`with Progress(label, total) as progress:`, and `progress.step()` after each step; a note may go along."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done, self._longest = label, total, 0, 0
        self._start = self._told = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar = _tqdm_bar(label, total, self._terminal)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._terminal and self._done:
            print(file=sys.stderr)

    def step(self, note: str = "") -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
            return
        now = time.monotonic()
        line = f"{self._label} {self._done}/{self._total} {now - self._start:.0f} s" + (f", {note}" if note else "")
        if self._terminal:
            self._longest = max(self._longest, len(line))
            print(f"\r{line:{self._longest}}", end="", file=sys.stderr, flush=True)
        elif now - self._told >= _LOG_SECONDS:
            self._told = now
            print(line, file=sys.stderr, flush=True)


def _tqdm_bar(label: str, total: int, terminal: bool) -> Any:
    """A widget in a notebook, else text. None where tqdm is not installed, or what is written is a log."""
    if not terminal and "ipykernel" not in sys.modules:
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(desc=label, total=total)
