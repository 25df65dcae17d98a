"""Config files: what is written can be read, reads well and is the same every time; what is wrong is named."""

import json
import multiprocessing
import os
from dataclasses import replace

import pytest

from relibra_kernels.configs.files import SHIPPED, Bucket, Entry, load_entries, merged, path_of, update
from relibra_kernels.configs.schema import first_fault
from relibra_kernels.planner.errors import FormatError

ENTRY = Entry(
    "down", "bf16", 2048, 768, False, False, "compiled", "3.7.1", None, "2026-11-24",
    (Bucket(8, 256, "128x128x64w8s3", 12.3456), Bucket(2, 16, "64x64x32w4s2g4", 1.0)), ("Qwen3-30B-A3B",),
)  # fmt: skip
MEASURED = replace(
    ENTRY, evidence="measured", driver="570.1", buckets=(Bucket(8, 256, "64x128x64w4s4", 9.87654, 0.0123),)
)


@pytest.fixture
def path(tmp_path):
    return path_of(tmp_path, "H100", "grouped_gemm")


def put(path, *entries):
    update(path, "H100", "grouped_gemm", lambda old: merged(old, list(entries)))


def test_round_trip_in_any_order_gives_the_same_text(path, tmp_path):
    put(path, ENTRY, MEASURED)
    first = path.read_text()
    put(path, MEASURED, ENTRY)
    assert path.read_text() == first
    read = load_entries(path, "H100", "grouped_gemm")
    assert [entry.evidence for entry in read] == ["compiled", "measured"]
    assert read[0].buckets == (Bucket(2, 16, "64x64x32w4s2g4", 1.0), Bucket(8, 256, "128x128x64w8s3", 12.3))
    assert read[1].buckets == (Bucket(8, 256, "64x128x64w4s4", 9.88, 0.012),)
    assert all(len(line) <= 120 for line in first.splitlines())
    assert [file.name for file in path.parent.iterdir()] == ["grouped_gemm.json"]  # nothing left behind


def test_a_new_bucket_replaces_one_of_its_kind_only(path):
    put(path, ENTRY, MEASURED)
    newer = replace(ENTRY, triton="3.9.0", buckets=(Bucket(8, 256, "64x64x64w4s4", 3.0),))
    put(path, newer)
    configs = {
        (entry.evidence, entry.triton, bucket.slots): bucket.config
        for entry in load_entries(path, "H100", "grouped_gemm")
        for bucket in entry.buckets
    }
    assert configs == {
        ("compiled", "3.7.1", 2): "64x64x32w4s2g4",
        ("compiled", "3.9.0", 8): "64x64x64w4s4",
        ("measured", "3.7.1", 8): "64x128x64w4s4",
    }


def test_a_whole_grid_replaces_all_of_its_shape_and_evidence(path):
    other = replace(ENTRY, H=4096)
    put(path, ENTRY, MEASURED, other)
    newer = replace(ENTRY, triton="3.9.0", buckets=(Bucket(32, 256, "64x64x64w4s4", 3.0),))
    update(path, "H100", "grouped_gemm", lambda old: merged(old, [newer], whole=True))
    read = load_entries(path, "H100", "grouped_gemm")
    assert [(entry.H, entry.evidence, len(entry.buckets)) for entry in read] == [
        (2048, "compiled", 1),
        (2048, "measured", 1),
        (4096, "compiled", 2),
    ]


def good():
    return {"schema_version": 1, "kernel": "grouped_gemm", "device": "H100", "entries": []}


FAULTS = {
    "not json": ("{", "is not JSON"),
    "nested too deeply": ("[" * 100_000, "is not JSON"),
    "a list": ("[]", "must be of type object"),
    "a newer version": (json.dumps({**good(), "schema_version": 2}), "schema_version is 2"),
    "another kernel": (json.dumps({**good(), "kernel": "gate_up"}), "it is for gate_up on H100"),
    "another device": (json.dumps({**good(), "device": "A100"}), "not for grouped_gemm on H100"),
    "an unknown field": (json.dumps({**good(), "mood": 1}), "'mood', which is not known"),
    "no version": (json.dumps({k: v for k, v in good().items() if k != "schema_version"}), "has no 'schema_version'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_or_foreign_file_is_refused_and_kept(path, name):
    text, message = FAULTS[name]
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(FormatError, match=message) as caught:
        load_entries(path, "H100", "grouped_gemm")
    assert str(path) in str(caught.value)
    with pytest.raises(FormatError, match=message):
        put(path, ENTRY)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("config", "128x128", "must match"),
        ("config", 7, "must be of type string"),
        ("us", float("nan"), "must be 0 at least"),
        ("slots", True, "must be of type integer"),
        ("slots", 0, "must be 1 at least"),
        ("rows_per_slot", "16", "must be of type integer"),
    ],
)
def test_a_bad_bucket_is_refused_with_its_place(path, field, value, message):
    put(path, ENTRY)
    document = json.loads(path.read_text())
    document["entries"][0]["buckets"][1][field] = value
    path.write_text(json.dumps(document))
    with pytest.raises(FormatError, match=rf"entries\[0\]\.buckets\[1\]\.{field}.*{message}"):
        load_entries(path, "H100", "grouped_gemm")


def test_bytes_that_are_no_text(path):
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="cannot be read"):
        load_entries(path, "H100", "grouped_gemm")


def test_a_schema_word_that_is_not_understood_is_no_silent_pass():
    with pytest.raises(ValueError, match="maxLength"):
        first_fault("x", {"maxLength": 3})


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "H100").write_text("a file where the folder should be")
    with pytest.raises(FormatError, match="cannot be written"):
        put(path_of(tmp_path, "H100", "grouped_gemm"), ENTRY)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(path):
    path.parent.mkdir()
    path.parent.chmod(0o500)
    with pytest.raises(FormatError, match=r"cannot be written: Permission denied"):
        put(path, ENTRY)


def _writer(path, number):
    for i in range(10):
        bucket = Bucket(2, 1 << (number * 10 + i), "128x128x64w8s3", 1.0)
        put(path, replace(ENTRY, buckets=(bucket,)))


def test_two_processes_that_write_at_once_lose_nothing(path):
    """Every writer reads, changes and writes; without the lock one's buckets would overwrite the other's."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_writer, args=(path, number)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    (entry,) = load_entries(path, "H100", "grouped_gemm")
    assert [bucket.rows_per_slot for bucket in entry.buckets] == [1 << i for i in range(30)]


SHIPPED_FILES = sorted(SHIPPED.glob("*/*.json"))


@pytest.mark.parametrize("path", SHIPPED_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_files_are_valid_and_as_they_would_be_written(path, tmp_path):
    entries = load_entries(path, path.parent.name, path.stem)
    again = path_of(tmp_path, path.parent.name, path.stem)
    update(again, path.parent.name, path.stem, lambda old: entries)
    assert again.read_text() == path.read_text()
    assert all(bucket.slots & (bucket.slots - 1) == 0 for entry in entries for bucket in entry.buckets)


def test_one_model_does_not_take_away_what_others_share():
    """A shape that several models have: buckets of the one that is tuned anew are replaced, the others' stay."""

    def entry(models, buckets, config):
        found = tuple(Bucket(slots, 16, config, 1.0) for slots in buckets)
        return Entry("schedule", "bf16", 0, 0, False, False, "compiled", "3.7.1", None, "2026-11-24", found, models)

    shared = entry(("A", "B"), (2, 8, 32), "1024w4")
    (both,) = merged([shared], [entry(("A",), (2, 8), "512w4")], whole=True)
    assert {(b.slots, b.config) for b in both.buckets} == {(2, "512w4"), (8, "512w4"), (32, "1024w4")}
    assert set(both.models) == {"A", "B"}
    (alone,) = merged([shared], [entry(("B", "A"), (2,), "512w4")], whole=True)
    assert [bucket.slots for bucket in alone.buckets] == [2]
    (replaced,) = merged([shared], [entry(("C",), (2, 8, 32), "512w4")])
    assert set(replaced.models) == {"A", "B", "C"}
