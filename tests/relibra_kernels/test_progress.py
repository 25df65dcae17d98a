"""Progress: tqdm's bar in a terminal, a counting line without tqdm, a line now and then in a log."""

import io
import sys

import pytest

from relibra_kernels import progress
from relibra_kernels.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(monkeypatch, stream, times=(0, 0, 0, 0)):
    monkeypatch.setattr(sys, "stderr", stream)
    clock = iter(times)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress("compile", 3) as bar:
        for note in ("gate_up", "", "down"):
            bar.step(note)
    return stream.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    shown = run(monkeypatch, Terminal(), [0])  # the rest is tqdm's own clock
    assert "compile: 100%" in shown and "3/3" in shown and "down" in shown


def test_a_terminal_without_tqdm_gets_a_line_that_counts(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    shown = run(monkeypatch, Terminal(), [0, 1, 2, 3]).split("\r")
    assert [line.rstrip() for line in shown[1:]] == [
        "compile 1/3 1 s, gate_up",
        "compile 2/3 2 s",
        "compile 3/3 3 s, down",
    ]
    assert len(shown[2]) >= len(shown[1])  # what was there before is written over


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    assert run(monkeypatch, io.StringIO(), [0, 10, 31, 40]) == "compile 2/3 31 s\n"
    assert run(monkeypatch, io.StringIO(), [0, 1, 2, 3]) == ""


def test_a_notebook_gets_a_bar(monkeypatch):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert "3/3" in run(monkeypatch, io.StringIO(), [0])
