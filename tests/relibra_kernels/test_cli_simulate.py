"""`relibra simulate`, as a user starts it."""

import json
import re

import numpy as np
import pytest

from relibra_kernels.cli import main

SMALL = ["--models", "Qwen3-30B-A3B", "--ep", "8,16", "--layers", "2", "--micro-batches", "4"]


def test_prints_a_table_and_json(capsys):
    assert main(["simulate", *SMALL, "--json"]) == 0
    out = capsys.readouterr().out
    assert "Modelled, not measured" in out
    assert out.count("of balanced") == 2
    rows = json.loads(out.splitlines()[-1])
    assert {(row["ep"], row["policy"]) for row in rows} >= {(8, "relibra"), (16, "static"), (16, "eplb-global")}
    ours, balanced = (next(r for r in rows if r["ep"] == 16 and r["policy"] == p) for p in ("relibra", "balanced"))
    assert balanced["modelled_seconds"] / ours["modelled_seconds"] > 0.95


def test_the_report_is_one_page_without_a_network(tmp_path):
    page = tmp_path / "report.html"
    assert main(["simulate", *SMALL, "--html", str(page)]) == 0
    text = page.read_text()
    assert text.count("<h2>") == 3
    assert text.count("<svg") >= 8
    assert not re.search(r"(src|href)=|https?:|@import|url\(", text)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_on_recorded_loads(tmp_path, capsys):
    np.savez(tmp_path / "loads.npz", loads=np.random.default_rng(0).integers(0, 999, (2, 3, 128)))
    arguments = ["simulate", str(tmp_path / "loads.npz"), "--models", "Qwen3-30B-A3B", "--ep", "16"]
    assert main([*arguments, "--policies", "static,relibra"]) == 0
    assert "2 layers x 3 micro-batches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "nope"], "--models is 'nope'"),
        (["--device", "nope"], "--device is 'nope'"),
        (["--policies", "nope"], "--policies names 'nope'"),
        (["--ep", "12"], "--ep names '12'"),
        (["--ep", "x"], "--ep names 'x'"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--html", "/nonexistent/report.html"], "--html"),
        (["missing.npz"], "missing.npz"),
        (["--balance", "0.5"], "--balance is 0.5"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    assert main(["simulate", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""
