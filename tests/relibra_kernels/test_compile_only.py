"""Every kernel compiles for every target without a GPU: no spilled registers, and the instructions it should use."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from relibra_kernels.cli import main
from relibra_kernels.compiling.compile_only import compile_launch
from relibra_kernels.configs.config import GEMM_KERNELS, ROW_KERNELS
from relibra_kernels.configs.limits import DEVICES, INTERPRETER, TARGETS, device_named, device_of
from relibra_kernels.configs.spaces import SPACE, config_for, configs
from relibra_kernels.planner.errors import InputError
from relibra_kernels.tuning.catalogue import calls, recorded

interpreting = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: no compiler")
GATHERING = ["gate_up", "grad_hidden", "grad_weight"]
MMA = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma", "gfx950": "v_mfma"}


@interpreting
@pytest.mark.parametrize("kernel", GEMM_KERNELS)
@pytest.mark.parametrize("target", TARGETS)
def test_the_first_config_of_every_gemm(target, kernel):
    device = device_named(target)
    config = configs(kernel, device, torch.bfloat16)[0]
    variant, call = next(calls(kernel, config, torch.bfloat16))
    for number, launch in enumerate(recorded(device, call)):
        report = compile_launch(launch, device)
        assert report.spill_bytes == 0, (variant, report)
        assert report.shared_bytes <= device.shared_bytes, (variant, report)
        if number == 0:
            assert report.kernel == kernel
            assert report.mma is not None and report.mma.startswith(MMA[target])
            assert (report.tma > 0) == device.tma
            by_pointer = {"sm_80": GEMM_KERNELS, "sm_90": GATHERING, "sm_100": ["grad_weight"]}.get(target, [])
            assert (report.async_copies > 0) == (kernel in by_pointer)


@interpreting
@pytest.mark.parametrize("kernel", ROW_KERNELS)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_kernels_without_tensor_cores(target, kernel):
    device = device_named(target)
    for config in configs(kernel, device, torch.bfloat16):
        for variant, call in calls(kernel, config, torch.bfloat16):
            for launch in recorded(device, call):
                report = compile_launch(launch, device)
                assert report.spill_bytes == 0 and report.shared_bytes <= device.shared_bytes, (variant, report)


@interpreting
def test_the_command_prints_a_table_and_json(capsys):
    assert main(["compile", "--target", "sm_90", "--kernel", "permute", "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    reports = json.loads(last)
    assert len(table) == len(reports) + 1 and "registers" in table[0]
    keys = {"kernel", "config", "registers", "spill_bytes", "shared_bytes", "mma", "tma"}
    assert all(keys <= report.keys() and report["spill_bytes"] == 0 for report in reports)


def test_bad_targets_and_kernels_are_refused(capsys):
    assert main(["compile", "--target", "sm_70"]) == 2
    assert "target is 'sm_70'" in capsys.readouterr().err
    assert main(["compile", "--target", "sm_90", "--kernel", "attention"]) == 2
    assert "--kernel is 'attention'" in capsys.readouterr().err


def test_the_interpreter_cannot_compile():
    """It replaces the compiler for the whole process: a clear error, no crash."""
    command = [sys.executable, "-m", "relibra_kernels", "compile", "--target", "sm_90", "--kernel", "permute"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 2 and "needs a process without it" in done.stderr


@pytest.mark.parametrize("device", [*DEVICES.values(), INTERPRETER], ids=lambda device: device.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", SPACE)
def test_there_is_a_config_for_everything(kernel, dtype, device):
    for rows, slots in ((0, 1), (100, 128), (1 << 20, 16)):
        assert config_for(kernel, device, dtype, rows, slots) in configs(kernel, device, dtype)


def test_few_rows_a_slot_get_small_tiles():
    device = device_named("sm_90")
    assert config_for("grouped_gemm", device, torch.bfloat16, 1000, 128).block_m == 64
    assert config_for("grouped_gemm", device, torch.bfloat16, 100_000, 128).block_m == 128


GPUS = [
    (8, 0, "sm_80", False),
    (8, 7, "sm_86", False),
    (9, 0, "sm_90", False),
    (10, 3, "sm_100", True),
    (11, 0, "sm_100", False),
    (12, 1, "sm_120", False),
]


@pytest.mark.parametrize(("major", "minor", "name", "gather"), GPUS)
def test_a_gpu_gets_the_limits_of_its_nearest_older_relative(monkeypatch, major, minor, name, gather):
    shared = 90 * 1024
    properties = SimpleNamespace(
        name="NVIDIA X", major=major, minor=minor, multi_processor_count=77, shared_memory_per_block_optin=shared
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    device = device_of.__wrapped__(torch.device("cuda"))
    assert (device.name, device.programs, device.descriptor_gather) == (name, 77, gather)
    assert device.product == "NVIDIA-X"
    assert device.arch == 10 * major + minor and device.shared_bytes == shared
    assert config_for("grouped_gemm", device, torch.bfloat16, 1 << 20, 16).block_m == 128


AMD = [
    ("gfx942:sramecc+:xnack-", "AMD Instinct MI300X", "gfx942", "MI300X", 8),
    ("gfx950", "AMD Instinct MI355X", "gfx950", "MI355X", 8),
    ("gfx90a:sramecc+:xnack-", "AMD Instinct MI250X/MI250", "gfx90a", "AMD-Instinct-MI250X-MI250", 1),
    ("gfx9f0", "AMD Instinct MI9000", "gfx950", "AMD-Instinct-MI9000", 8),
]


@pytest.mark.parametrize(("arch", "gpu", "name", "product", "xcds"), AMD)
def test_an_amd_gpu_gets_the_limits_of_its_nearest_older_relative(monkeypatch, arch, gpu, name, product, xcds):
    properties = SimpleNamespace(name=gpu, gcnArchName=arch, multi_processor_count=110)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    device = device_of.__wrapped__(torch.device("cuda"))
    assert (device.name, device.product, device.xcds, device.programs) == (name, product, xcds, 110)
    assert device.arch == arch.split(":")[0]
    assert config_for("grouped_gemm", device, torch.bfloat16, 1 << 20, 16).block_m == 128


@pytest.mark.parametrize("arch", ["gfx908", "gfx1100"])
def test_an_amd_gpu_that_cannot_is_refused(monkeypatch, arch):
    properties = SimpleNamespace(name="AMD", gcnArchName=arch, multi_processor_count=110)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(InputError, match=rf"the GPU is a {arch}; the kernels know gfx90a, gfx942, gfx950"):
        device_of.__wrapped__(torch.device("cuda"))


def test_unknown_devices_are_refused(monkeypatch):
    with pytest.raises(InputError, match="sm_90"):
        device_named("sm_10")
    with pytest.raises(InputError, match="the tensors are on cpu"):
        device_of.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=7, minor=5, multi_processor_count=40)
    )
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(InputError, match=r"compute capability 7\.5; it must be 8\.0 or newer"):
        device_of.__wrapped__(torch.device("cuda"))
