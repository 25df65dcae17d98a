"""The check of config files: what it finds, what it samples, and that the docs show what is shipped."""

import importlib.util
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

from relibra_kernels.cli import main
from relibra_kernels.configs.config import GENERATIONS
from relibra_kernels.configs.files import SHIPPED, Bucket, Entry, load_entries, path_of, update
from relibra_kernels.configs.limits import device_named
from relibra_kernels.configs.products import PRODUCTS
from relibra_kernels.form import GPT_OSS, ExpertForm
from relibra_kernels.tuning.catalogue import PARTS
from relibra_kernels.tuning.check_configs import check_folder, fault_of
from relibra_kernels.tuning.compile_task import Task, launches_of
from relibra_kernels.tuning.launch_model import Resources
from relibra_kernels.tuning.models import MODELS
from relibra_kernels.tuning.search_goal import goals

ROOT = Path(__file__).parents[3]


def put(folder, device, kernel, part, config, *, transposed=False, interleaved=False, sizes=(2048, 768)):
    shape = (part, "bf16", *sizes, transposed, interleaved)
    found = "compiled", "3.7.1", None, "2026-11-24", (Bucket(8, 256, config, 1.0),), ()
    entry = Entry(*shape, *found, GENERATIONS.get(kernel, 1))
    update(path_of(folder, device, kernel), device, kernel, lambda old: [*old, entry])


def test_what_was_found_for_another_generation_is_a_fault(tmp_path):
    put(tmp_path, "H100", "grad_weight", "down", "128x128x64w8s3")
    assert not check_folder(tmp_path).faults
    path = tmp_path / "H100" / "grad_weight.json"
    path.write_text(path.read_text().replace('"generation": 3', '"generation": 2'))
    assert "down H=2048 I=768 is of generation 2 of grad_weight; it must be 3" in check_folder(tmp_path).faults[0]


def test_every_fault_is_named(tmp_path):
    put(tmp_path, "H100", "gate_up", "gate_up", "128x128x64w8s3")
    put(tmp_path, "MI300X", "gate_up", "gate_up", "128x128x64w8s3")
    (tmp_path / "MI300X" / "grad_hidden.json").write_text("[]")
    shutil.copytree(tmp_path / "H100", tmp_path / "H900")
    check = check_folder(tmp_path)
    assert check.configs == 2 and len(check.faults) == 3
    assert [task.target for task in check.tasks] == ["sm_90", "sm_90"]  # with one store of weights and with two
    text = "\n".join(sorted(check.faults))
    assert "H900 is not a known device: A100, H100" in text
    assert "MI300X/grad_hidden.json: $ is []; it must be of type object" in text
    assert "MI300X/gate_up.json: 128x128x64w8s3 of gate_up H=2048 I=768: its tiles take 98304 bytes" in text


def test_what_is_compiled_has_the_entry_s_layout(tmp_path):
    put(tmp_path, "H100", "grouped_gemm", "dx", "64x64x64w4s2g4", transposed=True, interleaved=True)
    put(tmp_path, "H200", "grouped_gemm", "dx", "64x64x64w4s2g4", transposed=True, interleaved=True)
    put(tmp_path, "H200", "grouped_gemm", "dx", "64x64x64w4s2", interleaved=True)
    tasks = check_folder(tmp_path).tasks
    assert {(task.config, task.form) for task in tasks} == {
        ("64x64x64w4s2g4", GPT_OSS),
        ("64x64x64w4s2", ExpertForm(is_concatenated=False)),
    }
    assert len(tasks) == 4  # H100 and H200 are one target


def test_kernels_without_tensor_cores_are_compiled_at_their_sizes(tmp_path):
    put(tmp_path, "H100", "permute", "unpermute", "1024w4", sizes=(2880, 0))
    put(tmp_path, "H100", "swiglu", "swiglu", "256w2", sizes=(0, 768), interleaved=True)
    put(tmp_path, "H100", "schedule", "schedule", "64x1024w4", sizes=(0, 0))
    check = check_folder(tmp_path)
    assert check.configs == 3 and len(check.faults) == 1 and "schedule takes one row at a time" in check.faults[0]
    assert {(task.kernel, task.hidden_size, task.intermediate_size) for task in check.tasks} == {
        ("permute", 2880, 0),
        ("swiglu", 0, 768),
    }
    for task in check.tasks:
        (launch,) = launches_of(task)
        assert launch.options.get("ACTIVATION", "clamped") == "clamped"  # interleaved columns are gpt-oss's


def test_a_sample_is_another_one_for_another_seed(tmp_path):
    for intermediate_size in range(1, 21):
        put(tmp_path, "H100", "gate_up", "gate_up", "128x128x64w8s3", sizes=(2048, 64 * intermediate_size))
    first, again, other = (check_folder(tmp_path, sample=5, seed=seed).tasks for seed in ("a", "a", "b"))
    assert first == again != other and len(first) == len(other) == 5
    assert set(first) <= set(check_folder(tmp_path).tasks)
    seen = Counter(task for seed in range(100) for task in check_folder(tmp_path, sample=5, seed=str(seed)).tasks)
    assert len(seen) == 40  # in time everything


def test_faults_of_compiled_configs():
    device, task = device_named("sm_80"), Task("sm_80", "gate_up", "gate_up", "64x64x64w4s2", 1, 1, ExpertForm(), 0)
    assert fault_of(task, Resources(255, 0, device.shared_bytes, 8), device) == ""
    assert "spills 4 bytes" in fault_of(task, Resources(255, 4, 1, 8), device)
    assert "bytes of shared memory of" in fault_of(task, Resources(255, 0, device.shared_bytes + 1, 8), device)
    assert "does not compile: PTXASError" in fault_of(task, "PTXASError", device)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: no compiler")
def test_the_command_compiles_and_fails_on_a_spill(tmp_path, capsys):
    """With the real compiler: a config that spills on an A100, with one store of weights as with two."""
    put(tmp_path, "A100", "gate_up", "gate_up", "128x128x64w4s3")
    assert main(["tune", "--check", "--out", str(tmp_path), "--jobs", "1", "--sample", "1"]) == 1
    out, err = capsys.readouterr()
    assert "gate_up gate_up 128x128x64w4s3" in err and "spills" in err
    assert "1 configs read, 1 launches compiled, 1 faults" in out
    assert main(["tune", "--check", "--out", str(tmp_path / "empty")]) == 0


DEVICES = sorted(path.name for path in SHIPPED.iterdir() if path.is_dir() and path.name[0] not in "._")


def test_the_shipped_files_are_whole():
    """Six devices, nine models, every kernel, every bucket of the grid."""
    assert set(DEVICES) == set(PRODUCTS)
    grid = [goal for model in MODELS for goal in goals(model)]
    for device in DEVICES:
        found = set()
        for kernel in PARTS:
            for entry in load_entries(path_of(SHIPPED, device, kernel), device, kernel):
                buckets = {(bucket.slots, bucket.rows_per_slot) for bucket in entry.buckets}
                assert len(buckets) == len(entry.buckets)
                found |= {(kernel, entry.part, model, *bucket) for model in entry.models for bucket in buckets}
        wanted = {(g.kernel, g.part, g.model.name, g.slots, g.rows_per_slot) for g in grid}
        assert wanted <= found
    assert not check_folder(SHIPPED).faults


def test_the_docs_show_what_is_shipped():
    spec = importlib.util.spec_from_file_location("tuning_table", ROOT / "bench" / "tuning_table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    text = (ROOT / "docs" / "tuning.md").read_text()
    assert table.written(text, table.table()) == text
    assert "**Compiled, not measured.**" in text
