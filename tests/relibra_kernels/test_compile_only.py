"""Every kernel compiles for every target without a GPU: no spilled registers, and the instructions it should use."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from relibra_kernels.cli import main
from relibra_kernels.compiling.compile_only import compile_launch
from relibra_kernels.compiling.known_bugs import known_bug
from relibra_kernels.configs.config import GEMM_KERNELS, ROW_KERNELS, parse_config
from relibra_kernels.configs.limits import DEVICES, INTERPRETER, device_named, device_of
from relibra_kernels.configs.spaces import SPACE, config_for, configs
from relibra_kernels.kernels.stores import Stores
from relibra_kernels.planner.errors import InputError
from relibra_kernels.tuning.catalogue import TOKENS, calls, recorded

interpreting = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: no compiler")
GATHERING = ["gate_up", "grad_hidden", "grad_weight"]
WRITTEN = (
    "shift_ptr",
    "totals_ptr",
    "first_tile_ptr",
    "position_of_ptr",
)  # made for the launch, each a tensor of its own
MMA = {
    "sm_80": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_103": "UTCHMMA",
    "gfx942": "v_mfma",
    "gfx950": "v_mfma",
}


@interpreting
@pytest.mark.parametrize("kernel", GEMM_KERNELS)
@pytest.mark.parametrize("target", MMA)
def test_the_first_config_of_every_gemm(target, kernel):
    device = device_named(target)
    config = configs(kernel, device, torch.bfloat16)[0]
    variant, call = next(calls(kernel, config, torch.bfloat16))
    for number, launch in enumerate(recorded(device, call)):
        report = compile_launch(launch, device)
        assert report.spill_bytes == 0 and not report.known_bug, (variant, report)
        assert report.shared_bytes <= device.shared_bytes, (variant, report)
        if number == 0:
            assert report.kernel == kernel
            assert report.mma is not None and report.mma.startswith(MMA[target])
            assert (report.tma > 0) == device.tma
            by_pointer = {"sm_80": GEMM_KERNELS, "sm_90": GATHERING}
            if device.family == "blackwell":
                by_pointer[target] = ["grad_weight"]
            assert (report.async_copies > 0) == (kernel in by_pointer.get(target, []))


@interpreting
def test_gradients_of_gate_weights_with_biases_of_two_stores():
    """For gfx942 Triton 3.7 fails on pointers that are chosen out of two tensors."""
    device = device_named("gfx942")
    config = configs("grad_hidden", device, torch.bfloat16)[0]
    found = dict(calls("grad_hidden", config, torch.bfloat16))
    report = compile_launch(recorded(device, found["gpt-oss, replicas"])[1], device)
    assert (report.kernel, report.spill_bytes) == ("dweights", 0)


@interpreting
@pytest.mark.parametrize("part", ["gate_up", "down"])
def test_a_gradient_of_a_bias_of_two_stores(part, tmp_path):
    """For AMD Triton 3.6, which is not here, fails on pointers that are chosen out of two tensors: none may be."""
    device = device_named("gfx942")
    found = dict(calls("grad_bias", None, torch.bfloat16))
    compile_launch(recorded(device, found[f"gpt-oss, replicas, {part}"])[0], device, dump=tmp_path)
    (program,) = (path.read_text() for path in tmp_path.rglob("*ttgir*"))
    assert "tt.store" in program or "buffer_store" in program
    assert not re.search(r"arith\.select .*!tt\.ptr", program)


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
@pytest.mark.parametrize(("target", "kernel"), [("sm_90", "swiglu"), ("gfx942", "swiglu"), ("sm_90", "gate_up")])
def test_what_is_not_a_number_stays_so(target, kernel, tmp_path):
    """Every limit keeps NaN. Of the compiled code: the default minimum does so in the interpreter, not on GPUs."""
    device = device_named(target)
    for variant, call in calls(kernel, configs(kernel, device, torch.bfloat16)[0], torch.bfloat16):
        if "replicas" not in variant:
            compile_launch(recorded(device, call)[0], device, dump=tmp_path / variant.replace("/", " "))
    programs = {path.parent.name: path.read_text() for path in tmp_path.rglob("ttgir")}
    bounds = r"arith\.(?:min|max)\w*f |tt\.clampf .*"
    found = {name: set(re.findall(bounds, program)) for name, program in programs.items()}
    assert len([name for name in found if found[name]]) >= 4, found  # of each activation with a limit, and relu2
    assert not re.findall(r"numf|propagateNan = none", str(found)), found


TWO_SUMS = """
  %a = tt.dot %x, %w, %acc, inputPrecision = ieee : tensor<64x32xbf16> * tensor<32x64xbf16> -> tensor<64x64xf32>
  %b = tt.dot %y, %v, {}, inputPrecision = ieee : tensor<64x32xbf16> * tensor<32x64xbf16> -> tensor<64x64xf32>
"""


def test_programs_that_triton_compiles_wrongly_are_named():
    """Two products into one accumulator, and a descriptor gather whose last block is not whole: on Blackwell alone."""
    blackwell, hopper = device_named("sm_100"), device_named("sm_90")
    assert "10821" in known_bug(TWO_SUMS.format("%a"), {}, blackwell)
    assert not known_bug(TWO_SUMS.format("%other"), {}, blackwell)
    assert not known_bug(TWO_SUMS.format("%a"), {}, hopper)
    gather = "%r = tt.descriptor_gather %d[%i, %k]"
    assert "10927" in known_bug(gather, {"D": 2880, "BLOCK_K": 128}, blackwell)
    assert not known_bug(gather, {"D": 2880, "BLOCK_K": 64}, blackwell)


def test_no_gather_descriptor_where_its_last_block_is_not_whole():
    """gpt-oss has H 2880: 45 blocks of 64, and 22.5 of 128."""
    device = device_named("sm_100")
    for block_k, mode in ((64, "gather"), (128, "pointer")):
        config = parse_config(f"64x64x{block_k}w4s2")
        for kernel in ("gate_up", "grad_hidden"):
            launches = [recorded(device, call)[0] for variant, call in calls(kernel, config, torch.bfloat16)]
            modes = {launch.options["A_MODE"] for launch in launches if launch.options["D"] == 2880}
            assert modes == {mode}, (kernel, block_k)


@pytest.mark.parametrize("kernel", GEMM_KERNELS)
def test_a_base_that_is_not_aligned_gets_no_descriptor(kernel, monkeypatch):
    """A weight may be a view that begins anywhere: each operand in turn, at 8 bytes past a multiple of 16."""
    device = device_named("sm_90")
    call = next(c for v, c in calls(kernel, None, torch.bfloat16) if "replicas" in v)
    names = {"gate_up": 3, "grouped_gemm": 3, "grad_hidden": 3, "grad_weight": 4}
    asked = []
    real = torch.Tensor.data_ptr
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: (asked.append(tensor), real(tensor))[1])
    assert recorded(device, call)[0].options["TMA"]
    described = list({id(tensor): tensor for tensor in asked}.values())
    assert len(described) >= names[kernel]
    for moved in described[: names[kernel]]:
        monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor, moved=moved: 8 if tensor is moved else 0)
        options = recorded(device, call)[0].options
        is_store = any(moved is store for store in described[:2])
        if kernel == "grad_weight" and is_store:  # of gradients, which are only written to
            assert options["TMA"] and not options["TMA_WRITES"]
        else:
            assert not options["TMA"]


def test_warps_are_specialised_where_all_operands_come_by_one_descriptor(monkeypatch):
    """Not for rows picked by index, nor for replicas that do not lie whole experts from their homes."""
    device, config = device_named("sm_100"), parse_config("128x256x64w4s4ws")
    (usual, *_), (specialised, *_) = (
        [recorded(device, call)[0] for variant, call in calls("grouped_gemm", one, torch.bfloat16)]
        for one in (replace(config, is_specialised=False), config)
    )
    names = ("SPECIALISED", "HALVES", "FLAT_SLOTS", "GROUP_M")
    assert [usual.options[name] for name in names] == [False, False, 0, 8]
    assert [specialised.options[name] for name in names] == [True, True, 32, 8]
    busy = replace(device, programs=148)
    call = next(call for variant, call in calls("grouped_gemm", config, torch.bfloat16))
    assert recorded(busy, call)[0].grid == (148,)  # one program takes all of an SM's tensor memory
    by_index = partial(call.func, torch.empty(TOKENS, 768, dtype=torch.bfloat16, device="meta"), gather=True)
    apart = Stores(call.keywords["weight"], call.keywords["weight"], 0, 0, 1)
    assert not recorded(device, partial(by_index, **call.keywords))[0].options["SPECIALISED"]
    monkeypatch.setattr(sys.modules[call.func.__module__], "two_stores", lambda *stores: apart)
    options = recorded(device, call)[0].options
    assert [options[name] for name in names] == [False, False, 0, 8]


def test_where_a_table_begins_compiles_nothing_anew():
    """Every int32 table of every kernel may be cut out of a larger one."""
    device = device_named("sm_90")
    for kernel in SPACE:
        for _, call in calls(kernel, None, torch.bfloat16):
            for launch in recorded(device, call):
                for parameter, given in zip(launch.kernel.params, launch.args, strict=False):
                    table = isinstance(given, torch.Tensor) and given.dtype == torch.int32 and given.ndim < 3
                    written = parameter.name in WRITTEN
                    assert not table or written or parameter.do_not_specialize_on_alignment, (launch, parameter.name)


@interpreting
def test_the_command_prints_a_table_and_json(capsys):
    assert main(["compile", "--target", "sm_90", "--kernel", "permute", "--json"]) == 0
    *table, sum_line, last = capsys.readouterr().out.splitlines()
    reports = json.loads(last)
    assert len(table) == len(reports) + 1 and "registers" in table[0]
    assert sum_line == f"{len(reports)} launches compiled without spills"
    keys = {"kernel", "config", "registers", "spill_bytes", "shared_bytes", "mma", "tma"}
    assert all(keys <= report.keys() and report["spill_bytes"] == 0 for report in reports)


@interpreting
def test_code_that_this_triton_cannot_read_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("relibra_kernels.compiling.compile_only.version_of", lambda package: (3, 6))
    assert main(["compile", "--target", "sm_103", "--kernel", "permute"]) == 2
    assert "target is sm_103, whose code the cuobjdump of Triton" in capsys.readouterr().err


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
    (10, 3, "sm_103", True),
    (11, 0, "sm_103", False),
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
