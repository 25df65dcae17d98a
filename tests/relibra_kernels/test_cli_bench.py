"""`relibra bench`, small, on a CPU: every implementation is timed, ours among them."""

import json
import sys

import pytest
import torch

from relibra_kernels.cli import main
from relibra_kernels.cli.bench.clock import Figures, verdict
from relibra_kernels.cli.bench.memory import begin_peak

SMALL = ["bench", "--shape", "64,32,4,2", "--tokens", "32", "--rounds", "2", "--device", "cpu", "--dtype", "fp32"]


def test_a_table_and_json(capsys):
    assert main([*SMALL, "--json"]) == 0
    *lines, record = capsys.readouterr().out.splitlines()
    found = json.loads(record)
    assert {"relibra", "loop", "grouped_mm"} <= found.keys()
    assert all(figures["forward_ms"] > 0 and figures["backward_ms"] > 0 for figures in found.values())
    assert all((figures["peak_bytes"] is not None) == sys.platform.startswith("linux") for figures in found.values())
    assert any(line.startswith("relibra ") and line.endswith(" 1.00x") for line in lines)
    assert "2 of 4 experts of 64,32,4,2, fp32; measured here" in lines[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the memory of a process")
def test_peak_memory_is_that_of_the_work():
    freed = torch.ones(1 << 24)  # 64 MiB that are free again when the work begins
    del freed
    peak = begin_peak(torch.device("cpu"))
    work = torch.ones(1 << 24)
    del work
    assert 60e6 < peak() < 90e6


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ([2.0, 2.2], "ours take less time, 2.10x as fast"),
        ([0.2, 0.3], "ours take MORE time, 0.25x as fast"),
        ([0.9, 3.0], "no difference"),
    ],
)
def test_the_verdict_is_of_the_layer_and_none_where_rounds_overlap(theirs, words):
    figures = {"relibra": Figures([0.5, 0.5], [0.5, 0.5]), "peer": Figures([0.0, 0.0], theirs)}
    assert words in verdict(figures, "peer")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens is 0"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--shape", "x"], "--model is 'x'"),
        (["--model", "qwen3"], "--model is 'qwen3' (did you mean Qwen3-30B-A3B?)"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
