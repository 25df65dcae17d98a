"""`relibra watch`: what it shows of a log."""

import json

from relibra_kernels.cli import main
from relibra_kernels.cli.watch import batches_of, lines_of

BATCH = {
    "rank": 0,
    "planned_max_mean": 1.001,
    "actual_max_mean": 1.002,
    "differing_tokens": 7,
    "seconds": {"dispatch": 0.25, "combine": 0.25, "compute": 1.0, "replica": 0.125, "migration": 0.0},
    "bytes": {"dispatch": {"fast": 2_000_000, "slow": 0}, "replica": {"fast": 500_000, "slow": 3_000_000}},
}


def test_a_line_a_batch(tmp_path, capsys):
    log = tmp_path / "run.jsonl"
    log.write_text("not json\n" + json.dumps({"loss": 1.0}) + "\n" + json.dumps(BATCH) + "\n" + json.dumps(BATCH)[:40])
    assert main(["watch", str(log), "--once"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    cells = dict(zip(head.replace("MB fast", "fast").replace("MB slow", "slow").split(), line.split(), strict=True))
    assert (cells["planned"], cells["actual"], cells["seconds"], cells["exchange"]) == (
        "1.001",
        "1.002",
        "1.625",
        "0.500",
    )
    assert (cells["fast"], cells["slow"], cells["deviating"], cells["static"]) == ("2.5", "3.0", "7", "-")
    log.write_text(log.read_text()[:-40] + json.dumps(BATCH | {"static_max_mean": 1.9}) + "\n")
    batches = list(batches_of(log))
    assert len(batches) == 2 and len(lines_of(batches, 1)) == 1 and "1.900" in lines_of(batches, 1)[0]


def test_a_log_without_batches_and_no_log(tmp_path, capsys):
    (tmp_path / "run.jsonl").write_text("")
    assert main(["watch", str(tmp_path / "run.jsonl"), "--once"]) == 0
    assert "no batch yet" in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "none.jsonl"), "--once"]) == 2
    assert "no such file" in capsys.readouterr().err
