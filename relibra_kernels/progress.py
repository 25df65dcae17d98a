"""A progress bar on stderr that needs no package; silent where stderr is not a terminal."""

import sys
import time
from types import TracebackType

_WIDTH = 30


class Progress:
    """`with Progress(label, total) as bar:` and `bar.step()` after each of `total` steps, with a word on it or not."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._note, self._longest = "", 0
        self._start = time.monotonic()
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            print(file=sys.stderr)

    def step(self, note: str = "") -> None:
        self._done += 1
        self._note = note
        self._draw()

    def _draw(self) -> None:
        if self._shown:
            filled = _WIDTH * self._done // max(self._total, 1)
            bar = "#" * filled + "." * (_WIDTH - filled)
            elapsed = time.monotonic() - self._start
            line = f"{self._label} [{bar}] {self._done}/{self._total} {elapsed:.0f} s"
            line += f", {self._note}" if self._note else ""
            self._longest = max(self._longest, len(line))
            print(f"\r{line:{self._longest}}", end="", file=sys.stderr, flush=True)
