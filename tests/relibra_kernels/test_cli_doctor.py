"""`relibra doctor`: it says what is there, and finds the traps that a test sets."""

import importlib.metadata
import json

import pytest
import torch

from relibra_kernels.cli import doctor, main
from relibra_kernels.configs.versions import version_of
from relibra_kernels.planner.errors import InputError


def findings(capsys):
    status = main(["doctor", "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("TRITON_INTERPRET", "RELIBRA_BACKEND", "RELIBRA_DEBUG", "CUDA_LAUNCH_BLOCKING", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_a_sound_machine(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for text in (
        "Versions\n",
        f"  torch {torch.__version__}",
        "tensors on cpu: plain torch",
        "gloo",
        "0 problems found",
    ):
        assert text in out
    status, found = findings(capsys)
    assert status == 0 and {entry["level"] for entry in found} <= {"ok", "note"}
    assert {entry["topic"] for entry in found} >= {"Versions", "Devices", "Backend", "Tuned configs", "Known traps"}


def test_traps_of_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("RELIBRA_DEBUG", "1")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    status, found = findings(capsys)
    traps = {
        entry["text"].split("=")[0]: entry
        for entry in found
        if entry["topic"] == "Known traps" and "=" in entry["text"]
    }
    assert {"TRITON_INTERPRET", "RELIBRA_DEBUG", "CUDA_LAUNCH_BLOCKING"} <= set(traps)
    assert traps["TRITON_INTERPRET"]["fix"].startswith("unset")
    assert status == 1  # nothing overlaps


def test_a_backend_that_cannot_be(capsys, monkeypatch):
    monkeypatch.setenv("RELIBRA_BACKEND", "cublas")
    status, found = findings(capsys)
    (backend,) = [entry for entry in found if entry["topic"] == "Backend"]
    assert status == 1 and "'cublas'" in backend["text"] and "RELIBRA_BACKEND" in backend["fix"]
    monkeypatch.setenv("RELIBRA_BACKEND", "reference")
    _, found = findings(capsys)
    assert any("since RELIBRA_BACKEND is reference" in entry["text"] for entry in found)


def test_packages_that_are_missing_or_old(capsys, monkeypatch):
    installed = {"numpy": "2.3.1", "torch": "2.9.1+cu128", "triton": None, "transformers": "5.30.0"}
    monkeypatch.setattr(doctor, "_version", installed.get)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    status, found = findings(capsys)
    by_text = {entry["text"]: entry for entry in found if entry["topic"] == "Versions"}
    assert by_text["torch 2.9.1+cu128 is older than 2.11, the oldest that works"]["level"] == "problem"
    assert by_text["triton is not installed (for the GPU kernels)"]["level"] == "problem"
    assert by_text["transformers 5.30.0"]["level"] == "ok"
    assert by_text["vllm is not installed (for rollouts with recorded routing)"]["level"] == "note"
    assert status == 1


def test_other_packages_that_are_traps(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda module: True)
    status, found = findings(capsys)
    texts = " ".join(entry["text"] + entry["fix"] for entry in found if entry["topic"] == "Known traps")
    assert status == 0 and "swiglu=False" in texts and "moe_router_fusion=False" in texts


def test_a_gpu_without_kernels_is_a_problem(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("RELIBRA_BACKEND", "reference")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    status, found = findings(capsys)
    problems = [entry["text"] for entry in found if entry["level"] == "problem"]
    assert status == 1 and any("tensors on cuda: plain torch" in text for text in problems)
    assert any("C compiler" in text for text in problems)


def with_versions(monkeypatch, **versions):
    """`doctor` and the check of the interpreter see these packages."""
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or real(name))
    version_of.cache_clear()


@pytest.fixture(autouse=True)
def forgets_versions():
    yield
    version_of.cache_clear()


@pytest.mark.parametrize(
    ("triton", "numpy", "fails"), [("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.7.1", "2.5.2", False)]
)
def test_an_interpreter_that_this_numpy_breaks(capsys, monkeypatch, triton, numpy, fails):
    with_versions(monkeypatch, triton=triton, numpy=numpy)
    status, found = findings(capsys)
    told = [entry for entry in found if "interpreter of Triton" in entry["text"]]
    assert status == 0 and bool(told) == fails
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    status, found = findings(capsys)
    assert status == fails
    if fails:
        pytest.importorskip("triton", reason="needs triton")
        from relibra_kernels.kernels import launch

        monkeypatch.setattr(launch, "INTERPRETING", True)
        with pytest.raises(InputError, match=rf"TRITON_INTERPRET is 1, but .*Triton {triton} fails with numpy {numpy}"):
            launch.target(torch.zeros(1))


def test_transformers_without_a_hook_for_expert_parallelism(capsys, monkeypatch):
    with_versions(monkeypatch, transformers="5.17.0")
    status, found = findings(capsys)
    (note,) = [entry for entry in found if "no hook for expert parallelism" in entry["text"]]
    assert status == 0 and note["level"] == "note" and "5.23" in note["fix"]
    with_versions(monkeypatch, transformers="5.16.1")
    status, found = findings(capsys)
    assert status == 1 and any("5.16.1 is older than 5.17" in entry["text"] for entry in found)


@pytest.mark.parametrize(("torch_there", "told"), [("2.11.0+cu130", 1), ("2.12.0", 0), ("2.13.0+cpu", 0)])
def test_torch_whose_compiler_needs_a_forward_first(capsys, monkeypatch, torch_there, told):
    with_versions(monkeypatch, torch=torch_there)
    status, found = findings(capsys)
    notes = [entry for entry in found if "fullgraph=True" in entry["text"]]
    assert status == 0 and [entry["level"] for entry in notes] == ["note"] * told
