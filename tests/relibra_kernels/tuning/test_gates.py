"""The gates on machine code: what they let through, and that each fault alone is found."""

import os
import re
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="needs triton")

from padded_columns import columns_issued

from relibra_kernels.cli import main
from relibra_kernels.compiling.machine_code import MachineCode, read_machine_code
from relibra_kernels.configs import spaces
from relibra_kernels.configs.config import parse_config
from relibra_kernels.configs.limits import device_for
from relibra_kernels.configs.products import PRODUCTS
from relibra_kernels.form import GPT_OSS, ExpertForm
from relibra_kernels.tuning.catalogue import PARTS
from relibra_kernels.tuning.compile_task import Task, compile_task
from relibra_kernels.tuning.gates import large_tasks, machine_faults, most_barriers, same_code
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
AMD = replace(GOOD, amd={"ds_read_u16": 0, "buffer_load": 8, "global_load": 0})


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
    assert machine_faults(large_tasks(MODELS[:1], PRODUCTS["H100"], (0,))[0], "PTXASError", H100) == [
        "does not compile: PTXASError"
    ]


def test_barriers_by_version():
    """Triton 3.7 gives every loop 3 at most, 3.9 one more, 3.6 one more where both operands come by descriptors."""
    assert [most_barriers("gate_up", version) for version in ("3.6.0", "3.7.1", "3.9.0")] == [3, 3, 4]
    assert [most_barriers("grouped_gemm", version) for version in ("3.6.0", "3.7.1", "3.9.0")] == [4, 3, 4]


def test_a_bias_may_be_narrow():
    biased = Task("sm_90", "gate_up", "gate_up", "128x128x64w8s3", 2880, 2880, GPT_OSS, 2)
    code = replace(GOOD, narrow_loads=1)
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
    outcome = Resources(200, 0, 1 << 17, 8, GOOD)
    task = Task("sm_90", "grad_hidden", "grad_hidden", "128x256x64w8s3", 2048, 1408, ExpertForm(), 2)
    assert not machine_faults(task, outcome, H100)
    assert machine_faults(replace(task, intermediate_size=1409), outcome, H100) == [
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
