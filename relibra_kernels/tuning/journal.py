"""Results of long work, in a file, as they come: what was done before a run was stopped is not done again."""

import json
from pathlib import Path
from typing import Any

from ..planner.errors import FormatError


class Journal:
    """Values by key, one JSON line each. `fresh` forgets what an earlier run left."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self._path = path
        self.known: dict[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if fresh:
                path.unlink(missing_ok=True)
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            if text and not text.endswith("\n"):  # the last line of a run that was killed
                path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise FormatError(f"{path}: cannot be written: {error.strerror or error}") from None
        for line in text.splitlines():
            try:
                key, _, value = json.loads(line)
            except ValueError:
                continue
            self.known[key] = value

    def add(self, key: str, note: str, value: Any) -> None:
        """`note` is for readers of the file."""
        self.known[key] = value
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, note, value]) + "\n")
