"""The gates on machine code: what they let through, and that each fault alone is found."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from padded_columns import columns_issued

from relibra_kernels.cli import main
from relibra_kernels.compiling.machine_code import MachineCode, read_machine_code
from relibra_kernels.configs import spaces
from relibra_kernels.configs.config import GEMM_KERNELS, parse_config
from relibra_kernels.configs.limits import device_for
from relibra_kernels.configs.products import PRODUCTS
from relibra_kernels.form import GPT_OSS, Activation, ExpertForm
from relibra_kernels.tuning.catalogue import OTHERS, PARTS
from relibra_kernels.tuning.compile_matrix import candidate_tasks
from relibra_kernels.tuning.compile_task import Task, compile_task, launches_of
from relibra_kernels.tuning.gates import activation_tasks, large_tasks, machine_faults, most_barriers, same_code
from relibra_kernels.tuning.launch_model import Resources
from relibra_kernels.tuning.models import MODELS, model_named
from relibra_kernels.tuning.padded_columns import multiply_adds

interpreting = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: no compiler")
H100, MI300X = device_for(PRODUCTS["H100"]), device_for(PRODUCTS["MI300X"])
GOOD = MachineCode(
    buffers=(3, 3),
    product="HGMMA 64x256x16 x4",
    products_in_flight=1,
    loads_in_flight=1,
    instructions=104,
    barriers=3,
    shared_bytes_a_clock=135.0,
    matrix_clocks=1024.0,
    is_flat=True,
    epilogue_share=0.1,
    wide_stores=16,
    stores=16,
)
UNFLATTENED, NOT_FLAT = replace(GOOD, is_flat=False), "loads nothing of the next tile before this one is stored"
WITHOUT_LEAVE = ("grad_hidden", "gelu_tanh")
AMD = replace(GOOD, is_flat=False, amd={"ds_read_u16": 0, "buffer_load": 8, "global_load": 0})


def faults(code, kernel="gate_up", device=H100, hidden_size=2048, **needs):
    task = Task(device.name, kernel, PARTS[kernel][0], "128x128x64w8s3", hidden_size, 768, ExpertForm(), 2)
    return machine_faults(task, Resources(**{**vars(Resources(200, 0, 1 << 17, 8)), **needs, "code": code}), device)


MUTATIONS = [
    ({"buffers": (2, 2)}, r"has \(2, 2\) buffers"),
    ({"loads_in_flight": 0}, "all of its loads"),
    ({"products_in_flight": 0}, "all of its products"),
    ({"is_flat": False}, "nothing of the next tile"),
    ({"descriptors": 1}, "makes 1 descriptors in the tile loop"),
    ({"shared_bytes_a_clock": 151.0}, "moves 151.0 bytes"),
    ({"epilogue_share": 0.13}, "epilogue of 0.13"),
    ({"wide_stores": 12}, "stores 4 of 16 times in less than 16 bytes"),
    ({"narrow_loads": 1, "loads": 9}, "loads 1 of 9 times in 1, 2 or 8 bytes"),
    ({"indices": 64}, "loads 64 times in 4 bytes"),
    ({"barriers": 6}, "waits at 6 barriers in a step"),
]


def test_what_is_as_it_must_be_passes():
    assert not faults(GOOD)
    assert not faults(replace(GOOD, epilogue_share=0.25, stores=17), "grad_hidden")
    assert not faults(AMD, device=MI300X, shared_bytes=1 << 15)


@pytest.mark.parametrize(("change", "message"), MUTATIONS, ids=lambda value: str(value)[:40])
def test_each_fault_alone_is_found(change, message):
    (fault,) = faults(replace(GOOD, **change))
    assert re.search(message, fault)


def test_faults_of_some_kernels_and_devices_alone():
    assert "135.0 bytes" in faults(GOOD, "grouped_gemm")[0]
    assert (
        "epilogue of 0.201"
        in faults(replace(GOOD, epilogue_share=0.201, stores=17), "grad_hidden", hidden_size=2880)[0]
    )
    assert "spills 8 bytes" in faults(GOOD, spill_bytes=8)[0]
    assert "shared memory; there are" in faults(GOOD, shared_bytes=1 << 20)[0]
    amd = {"device": MI300X, "shared_bytes": 1 << 15}
    assert "2 bytes at a time" in faults(replace(AMD, amd={**AMD.amd, "ds_read_u16": 64}), **amd)[0]
    assert "64-bit addresses" in faults(replace(AMD, amd={**AMD.amd, "global_load": 9}), **amd)[0]
    assert "64-bit addresses" in faults(replace(AMD, amd={**AMD.amd, "buffer_load": 0}), **amd)[0]
    assert "stores 8 of 16 times in less than 16 bytes" in faults(replace(AMD, wide_stores=8), **amd)[0]
    assert "loads 4 of 9 times in 1, 2 or 8 bytes" in faults(replace(AMD, narrow_loads=4, loads=9), **amd)[0]
    assert not faults(replace(AMD, narrow_loads=1), "grad_weight", **amd)  # where a slot begins and ends
    assert faults(replace(AMD, narrow_loads=2), "grad_weight", **amd)
    assert machine_faults(large_tasks(MODELS[:1], PRODUCTS["H100"], (0,))[0], "PTXASError", H100) == [
        "does not compile: PTXASError"
    ]


@pytest.mark.parametrize("device", [H100, device_for(PRODUCTS["A100"]), device_for(PRODUCTS["B200"])], ids=str)
@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("kernel", ["gate_up", "grad_hidden"])
def test_which_loops_are_flattened(kernel, activation, device):
    """By kernel, activation and target, and what is not to be is found as well as what is."""
    flat = replace(GOOD, epilogue_share=0.1, barriers=2)
    form = ExpertForm(activation=activation)
    task = Task(device.name, kernel, kernel, "128x256x64w8s3", 2880, 1536, form, 2)
    expected = device == H100 and (kernel == "gate_up" or activation in ("silu", "relu2"))
    found = [machine_faults(task, Resources(200, 0, 1 << 17, 8, code), device) for code in (flat, UNFLATTENED)]
    assert found[expected] == [NOT_FLAT if expected else "is flattened; `_FLATTENED` of the gates must name what is"]
    assert found[not expected] == []
    assert [t.form.activation for t in activation_tasks(PRODUCTS["H100"]) if t.kernel == kernel] == OTHERS


def test_loops_with_half_tiles_or_interleaved_weights_are_not_flattened():
    for intermediate_size, form, count in ((1536, ExpertForm(), 1), (1408, ExpertForm(), 0), (1536, GPT_OSS, 0)):
        sizes = ("128x256x64w8s3", 2880, intermediate_size, form, 2)
        found = machine_faults(
            Task("sm_90", "grad_hidden", "grad_hidden", *sizes), Resources(200, 0, 1 << 17, 8, UNFLATTENED), H100
        )
        assert found == [NOT_FLAT] * count


@interpreting
def test_a_loop_that_is_flattened_without_leave_is_found(monkeypatch):
    (task,) = [t for t in activation_tasks(PRODUCTS["H100"]) if (t.kernel, t.form.activation) == WITHOUT_LEAVE]
    assert not machine_faults(task, compile_task(task), H100)
    launches_of.cache_clear()
    monkeypatch.setattr(sys.modules["relibra_kernels.kernels.grad_hidden"], "_flattens", lambda form: True)
    assert any("is flattened" in fault for fault in machine_faults(task, compile_task(task), H100))
    launches_of.cache_clear()


def test_barriers_by_version():
    """Triton 3.7 gives every loop 3 at most, 3.9 one more, 3.6 one more where both operands come by descriptors."""
    assert [most_barriers("gate_up", version) for version in ("3.6.0", "3.7.1", "3.9.0")] == [3, 3, 4]
    assert [most_barriers("grouped_gemm", version) for version in ("3.6.0", "3.7.1", "3.9.0")] == [4, 3, 4]


def test_a_bias_may_be_narrow():
    biased = Task("sm_90", "gate_up", "gate_up", "128x128x64w8s3", 2880, 2880, GPT_OSS, 2)
    code = replace(UNFLATTENED, narrow_loads=1)
    assert not machine_faults(biased, Resources(200, 0, 1 << 17, 8, code), H100)
    assert machine_faults(biased, Resources(200, 0, 1 << 17, 8, replace(code, narrow_loads=2)), H100)


def test_configs_of_the_same_code_are_found():
    compiled = [("gate_up, one", "a", "1"), ("gate_up, one", "b", "2"), ("gate_up, two", "b", "1")]
    assert same_code(compiled) == []
    assert same_code([*compiled, ("gate_up, one", "c", "1")]) == ["a = c: gate_up, one"]


@interpreting
def test_a_config_that_compiles_to_the_code_of_another_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(spaces.SPACE, "grad_weight", [parse_config("64x64x64w4s2"), parse_config("64x64x64w4s3")])
    command = ["compile", "--target", "sm_80", "--kernel", "grad_weight"]
    assert main(command) == 0  # they differ
    assert "same code" not in capsys.readouterr().err
    usual = spaces.SPACE["grad_weight"][0]
    in_fours = replace(usual, group_m=4)  # of which grad_weight's kernel knows nothing
    monkeypatch.setitem(spaces.SPACE, "grad_weight", [usual, in_fours])
    assert main(command) == 1
    assert "the same code twice: 64x64x64w4s2 = 64x64x64w4s2g4: grad_weight" in capsys.readouterr().err


@interpreting
def test_candidates_of_the_same_code_are_refused(monkeypatch, capsys):
    usual = parse_config("64x64x64w4s2")
    command = ["compile", "--target", "gfx942", "--candidates", "--kernel", "grad_weight", "--sample", "1"]
    monkeypatch.setitem(spaces.SPACE, "grad_weight", [usual])
    monkeypatch.setitem(spaces.WIDER, "grad_weight", [parse_config("64x64x32w4s2")])
    assert main(command) == 0
    assert capsys.readouterr().out == "gfx942: 2 candidates, 2 compiled, 0 of the code of another\n"
    monkeypatch.setitem(spaces.WIDER, "grad_weight", [replace(usual, group_m=4)])  # its kernel knows no groups
    assert main(command) == 1
    assert "the same code twice: 64x64x64w4s2 = 64x64x64w4s2g4: grad_weight" in capsys.readouterr().err


def test_a_sample_of_candidates_is_whole_launches():
    """Equal code is found among all that is tried for one launch."""
    device = H100
    whole = candidate_tasks(device)
    assert {task.kernel for task in whole} == set(GEMM_KERNELS) and len({task.part for task in whole}) == 4
    launches = {(task.kernel, task.part, task.form) for task in whole}
    found = candidate_tasks(device, sample=1, seed="a")
    ((kernel, part, form),) = {(task.kernel, task.part, task.form) for task in found}
    assert (kernel, part, form) in launches
    assert [t.config for t in found] == [str(c) for c in spaces.candidates(kernel, device, torch.bfloat16)]
    assert len({candidate_tasks(device, sample=1, seed=str(seed))[0].kernel for seed in range(20)}) > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "sm_90", "--candidates", "--kernel", "permute"], "--kernel is 'permute'"),
        (["--target", "sm_90", "--candidates", "--sample", "0"], "--sample is 0"),
        (["--device", "H100", "--candidates"], "--candidates is given with --device H100"),
        (["--device", "H100", "--kernel", "permute"], "--kernel is 'permute'"),
    ],
)
def test_what_no_gate_knows_is_refused(flags, message, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["compile", *flags]) == 2
    assert message in capsys.readouterr().err


def test_large_batches_of_every_model_get_whole_tiles():
    """Two parts of two kernels, one of two others, with replicas and without."""
    for model in MODELS:
        tasks = large_tasks([model], PRODUCTS["H100"], (0, 2))
        assert len(tasks) == 12 and {task.config.split("x")[0] for task in tasks} <= {"128", "256"}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=lambda product: product.name)
def test_whole_tiles_compute_few_columns_for_nothing(product):
    """At most 7 % of any GEMM of any model."""
    for model in MODELS:
        found = columns_issued(model, product)
        assert len(found) == 7 and max(found.values()) <= 1.07, model


def test_columns_are_counted_by_hand():
    """Tiles of 128 gate columns, 256 columns and 128x256 of a weight, over I 1408 and H 2048: 5.5 for grad_hidden."""
    found = columns_issued(model_named("Moonlight-16B-A3B"), PRODUCTS["H100"])
    assert len(found) == 7 and set(found.values()) == {1.0}

    def ratio(*task):
        issued, needed = multiply_adds(Task("sm_90", *task, 0))
        return issued / needed

    for kernel, tile in (("grad_hidden", "128x256x64w8s3"), ("gate_up", "128x128x64w8s3")):
        assert ratio(kernel, kernel, tile, 2048, 1409, ExpertForm()) == 1536 / 1409
    assert ratio("grad_weight", "down", "128x256x64w8s3", 2880, 2880, GPT_OSS) == 2944 * 2944 / 2880**2


def test_columns_for_nothing_are_a_fault():
    """The tiles of I 1408 and of I 1409, whose last one is more than half full."""
    halved, whole = (Resources(200, 0, 1 << 17, 8, code) for code in (UNFLATTENED, GOOD))
    task = Task("sm_90", "grad_hidden", "grad_hidden", "128x256x64w8s3", 2048, 1408, ExpertForm(), 2)
    assert not machine_faults(task, halved, H100)
    assert machine_faults(replace(task, intermediate_size=1409), whole, H100) == [
        "multiplies 1.090 times the columns that there are; 1.07 at most"
    ]


@interpreting
def test_real_code_is_read_and_passes():
    """A weight gradient for an H100: three buffers, products and loads in flight, nothing made in the tile loop."""
    task = Task("sm_90", "grad_weight", "gate_up", "128x256x64w8s3", 2048, 768, ExpertForm(), 2)
    outcome = compile_task(task)
    assert not isinstance(outcome, str), outcome
    assert machine_faults(task, outcome, H100) == []
    assert outcome.code.buffers == (3, 3) and outcome.code.product == "HGMMA 64x256x16 x4"
    assert (outcome.code.products_in_flight, outcome.code.loads_in_flight, outcome.code.descriptors) == (1, 1, 0)


WIDTHS = """
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	global_load_dword v0, v1, s[0:1]
	buffer_load_ushort v0, v1, s[0:3], 0 offen
	global_load_dwordx2 v[0:1], v2, s[0:1]
	buffer_store_dwordx2 v[0:1], v2, s[0:3], 0 offen
	buffer_store_dwordx4 v[0:3], v4, s[0:3], 0 offen
	global_store_short_d16_hi v0, v1, s[0:1]
	scratch_store_dword v0, v1, off
	s_endpgm
"""


def test_widths_of_amd_are_read():
    code = read_machine_code({"ttgir": "", "amdgcn": WIDTHS}, {"persistent": False})
    assert (code.loads, code.narrow_loads, code.indices) == (4, 2, 1)
    assert (code.stores, code.wide_stores, code.local) == (3, 1, 1)


@interpreting
@pytest.mark.parametrize("kernel", ["grouped_gemm", "gate_up"])
def test_tiles_that_amd_does_not_store_in_halves_are_found(kernel, monkeypatch):
    """gpt-oss's gate_up and every down and dx: as they are, and with 8 bytes at a time."""
    part, config, sizes = {
        "grouped_gemm": ("dx", "128x128x64w4s3", (2048, 768, ExpertForm())),
        "gate_up": ("gate_up", "64x64x64w4s2", (2880, 2880, GPT_OSS)),
    }[kernel]
    task = Task("gfx942", kernel, part, config, *sizes, 0)
    assert machine_faults(task, compile_task(task), MI300X) == []
    monkeypatch.setattr(sys.modules[f"relibra_kernels.kernels.{kernel}"], "stores_in_halves", lambda tensor: False)
    launches_of.cache_clear()
    (fault,) = machine_faults(task, compile_task(task), MI300X)
    assert re.fullmatch(r"stores \d+ of \d+ times in less than 16 bytes", fault)
    launches_of.cache_clear()


@interpreting
def test_amd_loads_weights_of_a_large_store_with_32_bit_offsets():
    """Mixtral's 16 experts are 3.8 GB; an offset counts from its expert."""
    task = Task("gfx942", "gate_up", "gate_up", "64x64x64w4s2", 4096, 14336, ExpertForm(), 0)
    outcome = compile_task(task)
    assert machine_faults(task, outcome, MI300X) == [] and outcome.code.amd["buffer_load"] == 6


TRITON_3_9 = Path(__file__).parents[3] / ".venv" / "triton-3.9.0"
SPECIALISED = """
from relibra_kernels.form import ExpertForm
from relibra_kernels.tuning.compile_task import Task, compile_task

found = compile_task(Task("sm_100", "grouped_gemm", "down", "128x256x64w4s4ws", 2048, 768, ExpertForm(), 2))
code = found.code
assert (found.spill_bytes, code.local, code.accumulators, code.buffers) == (0, 0, 2, (4, 4)), found
assert code.barriers == 0 and code.stores == code.wide_stores > 0 and code.descriptors == 0, found
assert code.epilogue_instructions > 4 * code.instructions and code.epilogue_share < 0.25, found
"""


@interpreting
@pytest.mark.skipif(not TRITON_3_9.exists(), reason="needs Triton 3.9: make .venv/triton-3.9.0")
def test_specialised_warps_have_two_accumulators():
    """Products go into one while other warps store the other: what stores is no part of the products' loop."""
    env = {**os.environ, "PYTHONPATH": str(TRITON_3_9)}
    done = subprocess.run([sys.executable, "-c", SPECIALISED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@interpreting
def test_a_dump_is_what_is_read(tmp_path, capsys):
    command = ["compile", "--target", "sm_90", "--first", "--kernel", "permute", "--dump", str(tmp_path)]
    assert main(command) == 0
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == len(capsys.readouterr().out.splitlines()) - 2  # the head of the table, and its sum
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {"ttgir", "ptx", "sass", "usage", "json"}
    texts = {name: (folders[0] / name).read_text() for name in ("ttgir", "sass")}
    code = read_machine_code(texts, {"persistent": False})
    assert code.product == "" and code.loads > 0 and code.wide_stores > 0


def test_a_bad_device_is_refused(capsys):
    assert main(["compile", "--device", "H900"]) == 2
    assert "H900" in capsys.readouterr().err
