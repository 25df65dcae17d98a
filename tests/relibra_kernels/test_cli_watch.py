"""`relibra watch`: what it shows of a log."""

import json
import re
from dataclasses import fields

from relibra_kernels.cli import main
from relibra_kernels.cli.watch import batches_of, lines_of
from relibra_kernels.parallel import BatchStats

BATCH = {
    "rank": 0,
    "static_max_mean": None,
    "planned_max_mean": 1.001,
    "actual_max_mean": 1.002,
    "saved_seconds": None,
    "differing_tokens": 7,
    "dispatch_seconds": 0.25,
    "combine_seconds": 0.25,
    "compute_seconds": 1.0,
    "replica_seconds": 0.125,
    "migration_seconds": 0.0,
    "token_fast_bytes": 2_000_000,
    "fetched_fast_bytes": 500_000,
    "kept_slow_bytes": 3_000_000,
}


def test_it_reads_what_a_run_logs():
    assert BATCH.keys() <= {field.name for field in fields(BatchStats)}


def test_a_line_a_batch(tmp_path, capsys):
    log = tmp_path / "run.jsonl"
    log.write_text("not json\n" + json.dumps({"loss": 1.0}) + "\n" + json.dumps(BATCH) + "\n" + json.dumps(BATCH)[:40])
    assert main(["watch", str(log), "--once"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    cells = dict(
        zip(
            re.sub(r"(MB fast|MB slow|saved s)", lambda m: m[0].replace(" ", "_"), head).split(),
            line.split(),
            strict=True,
        )
    )
    assert (cells["planned"], cells["actual"], cells["seconds"], cells["exchange"]) == (
        "1.001",
        "1.002",
        "1.625",
        "0.500",
    )
    assert (cells["MB_fast"], cells["MB_slow"], cells["deviating"]) == ("2.5", "3.0", "7")
    assert cells["static"] == cells["saved_s"] == "-"
    log.write_text(log.read_text()[:-40] + json.dumps(BATCH | {"static_max_mean": 1.9, "saved_seconds": 0.75}) + "\n")
    batches = list(batches_of(log))
    assert len(batches) == 2 and len(lines_of(batches, 1)) == 1 and "0.750" in lines_of(batches, 1)[0]
    assert "1.900" in lines_of(batches, 1)[0] and "1.625" in lines_of(batches, 1)[0]  # what was saved is not spent


def test_a_log_without_batches_and_no_log(tmp_path, capsys):
    (tmp_path / "run.jsonl").write_text("")
    assert main(["watch", str(tmp_path / "run.jsonl"), "--once"]) == 0
    assert "no batch yet" in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "none.jsonl"), "--once"]) == 2
    assert "no such file" in capsys.readouterr().err
