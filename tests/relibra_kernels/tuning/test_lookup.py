"""Which config a launch gets, from whom, how fast, and what happens where a file or a setting is wrong."""

import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from relibra_kernels.configs import lookup
from relibra_kernels.configs.config import BlockConfig, GemmConfig, misfit, parse_config
from relibra_kernels.configs.files import Bucket, Entry, load_entries, merged, path_of, update
from relibra_kernels.configs.limits import DEVICES, INTERPRETER, device_for
from relibra_kernels.configs.products import PRODUCTS
from relibra_kernels.configs.spaces import candidates, config_for
from relibra_kernels.planner.errors import InputError
from relibra_kernels.tuning.catalogue import PARTS

H100, A100 = device_for(PRODUCTS["H100"]), device_for(PRODUCTS["A100"])
BF16 = torch.bfloat16
SHAPE = ("down", "bf16", 2048, 768, False, False)  # grouped_gemm sees N=2048, D=768, layout True
HEURISTIC = config_for("grouped_gemm", H100, BF16, 1 << 20, 16)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """(user's, shipped), both empty; nothing remembered."""
    user, shipped = tmp_path / "user", tmp_path / "shipped"
    monkeypatch.setenv("RELIBRA_CONFIG_DIR", str(user))
    monkeypatch.setattr(lookup, "SHIPPED", shipped)
    monkeypatch.delenv("RELIBRA_CONFIG", raising=False)
    lookup.forget()
    yield user, shipped
    lookup.forget()


def put(folder, config, *, evidence="compiled", slots=16, rows=1024, device="H100", shape=SHAPE):
    entry = Entry(*shape, evidence, "3.7.1", None, "2026-11-24", (Bucket(slots, rows, config, 1.0),))
    path = path_of(folder, device, "grouped_gemm")
    update(path, device, "grouped_gemm", lambda old: merged(old, [entry]))
    lookup.forget()
    return path


def get(rows_per_slot=1024, slots=16, device=H100, dtype=BF16, sizes=(2048, 768), layout=True):
    return str(lookup.config_of("grouped_gemm", device, dtype, sizes, rows_per_slot * slots, slots, layout))


def test_who_is_asked_first(folders, monkeypatch):
    user, shipped = folders
    assert get() == str(HEURISTIC)
    for folder, evidence, config in (
        (shipped, "compiled", "64x64x64w4s2"),
        (user, "compiled", "64x64x64w4s3"),
        (shipped, "measured", "64x128x64w4s2"),
        (user, "measured", "64x128x64w4s3"),
    ):
        put(folder, config, evidence=evidence)
        assert get() == config
    lookup.agree({lookup.without_device(key): parse_config("64x128x64w4s4") for key in list(lookup._answers)})
    assert get() == "64x128x64w4s4"
    lookup.forget()
    monkeypatch.setenv("RELIBRA_CONFIG", "gate_up=64x64x64w4s2,grouped_gemm=128x64x64w8s4g4")
    assert get() == "128x64x64w8s4g4"


def test_what_the_ranks_agreed_on_must_fit_here():
    get()
    lookup.agree({lookup.without_device(key): parse_config("128x256x64w8s4") for key in list(lookup._answers)})
    assert get() == "128x256x64w8s4"
    lookup.agree({lookup.without_device(key): parse_config("128x256x64w8s8") for key in list(lookup._answers)})
    with pytest.raises(
        InputError, match="the first rank chose grouped_gemm 128x256x64w8s8 for all, but here its tiles"
    ):
        get()


def test_the_log_says_who_answered(folders, caplog):
    put(folders[0], "64x64x64w4s3", evidence="measured")
    with caplog.at_level("INFO", lookup.__name__):
        get()
        get()
        get(sizes=(2048, 999))
    first, second = caplog.messages
    assert "64x64x64w4s3" in first and "user H100, measured" in first
    assert "heuristic" in second and "D=999" in second


NEAREST = [
    # rows a slot, slots, the bucket that answers
    (1024, 16, (1024, 16)),
    (2047, 31, (1024, 16)),
    (2048, 16, (1024, 16)),
    (64, 16, (64, 16)),
    (256, 16, (1024, 16)),  # in the middle of 64 and 1024: the larger
    (255, 16, (64, 16)),
    (1024, 100, (1024, 128)),
    (1024, 32, (1024, 16)),
    (8191, 16, (1024, 16)),
    (8192, 16, None),  # more than two octaves away
    (15, 16, None),
    (1024, 2, (1024, 16)),
    (1024, 1, None),
]


@pytest.mark.parametrize(("rows", "slots", "bucket"), NEAREST)
def test_the_nearest_bucket_answers(folders, rows, slots, bucket):
    configs = {(64, 16): "64x64x64w4s2", (1024, 16): "64x64x64w4s3", (1024, 128): "64x128x64w4s2"}
    for (r, s), config in configs.items():
        put(folders[1], config, rows=r, slots=s)
    expected = configs[bucket] if bucket else str(config_for("grouped_gemm", H100, BF16, rows * slots, slots))
    assert get(rows, slots) == expected


def test_other_sizes_layouts_and_devices_do_not_answer(folders):
    put(folders[1], "64x64x64w4s3")
    assert get() == "64x64x64w4s3"
    assert get(dtype=torch.float16) == "64x64x64w4s3"  # operands and accumulators of the same sizes
    for other in ({"sizes": (2048, 1536)}, {"layout": False}, {"device": A100}, {"dtype": torch.float32}):
        assert get(**other) != "64x64x64w4s3"


def test_a_layer_and_its_transposed_twin_are_told_apart(folders):
    """dx of gate_up multiplies by [H, 2I] as it is stored where the weight is [2I, H]."""
    dx = Entry("dx", *SHAPE[1:], "compiled", "", None, "", ())
    assert dx.sizes("grouped_gemm") == (2048, 1536, False, False)
    assert replace(dx, transposed=True).sizes("grouped_gemm") == (2048, 1536, True, False)
    assert replace(dx, part="down").sizes("grad_weight") == (2048, 768, True, False)
    assert replace(dx, part="gate_up", transposed=True).sizes("grad_weight") == (2048, 1536, True, False)
    assert replace(dx, part="gate_up").sizes("grad_weight") == (1536, 2048, False, False)


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_what_does_not_fit_the_device_is_named_and_skipped(folders, caplog):
    path = put(folders[1], "128x256x64w8s3", device="A100", rows=1024)
    put(folders[1], "64x64x64w4s2", device="A100", rows=512)
    small = replace(A100, shared_bytes=99 * 1024)
    assert get(device=small) == "64x64x64w4s2"
    (record,) = warnings_in(caplog)
    assert re.search(r"128x256x64w8s3 does not fit.*147456 bytes", record) and str(path) in record


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("100x64x64w4s2", "power of two"),
        ("32x64x64w4s2", "64 and 128 rows"),
        ("64x64x64w3s2", "num_warps is 3"),
        ("64x64x64w64s2", "num_warps is 64"),
        ("64x64x64w4s0", "num_stages is 0"),
    ],
)
def test_configs_that_no_device_takes(folders, config, message, caplog):
    put(folders[1], config)
    assert get() == str(HEURISTIC)
    assert any(message in record for record in warnings_in(caplog))


@pytest.mark.parametrize(
    ("kernel", "config", "message"),
    [
        ("permute", "1000w4", "columns is 1000; it must be a power of two, 32 at least"),
        ("permute", "16w4", "columns is 16"),
        ("permute", "2x1024w4", "rows is 2; permute takes one row at a time"),
        ("grad_bias", "3x64w4", "rows is 3"),
        ("grad_bias", "1024x1024w8", "has 1048576 elements"),
        ("schedule", "1024w64", "num_warps is 64"),
        ("swiglu", "64x64x64w4s2", "swiglu takes configs like 2048w8"),
    ],
)
def test_blocks_that_no_device_takes(kernel, config, message):
    assert message in misfit(kernel, parse_config(config), H100, BF16)


def test_a_broken_file_is_named_once_and_skipped(folders, caplog):
    path = put(folders[0], "64x64x64w4s3")
    put(folders[1], "64x64x64w4s2")
    path.write_text("{")
    lookup.forget()
    assert get() == get(2048) == "64x64x64w4s2"
    (record,) = warnings_in(caplog)
    assert "is not JSON" in record and str(path) in record


BAD_SETTINGS = {
    "attention=64x64x64w4s2": "names 'attention'",
    "grouped_gemm": "config is ''",
    "grouped_gemm=64x64": "config is '64x64'",
    "grouped_gemm=1024w4": "grouped_gemm takes configs like 128x256x64w8s3",
    "grouped_gemm=128x256x64w8s8": "bytes of shared memory; sm_90 has",
}


@pytest.mark.parametrize("value", BAD_SETTINGS)
def test_a_bad_override_is_an_error(monkeypatch, value):
    monkeypatch.setenv("RELIBRA_CONFIG", value)
    with pytest.raises(InputError, match=BAD_SETTINGS[value]):
        get()


@pytest.mark.parametrize("device", [*DEVICES.values(), INTERPRETER, replace(H100, product="NVIDIA-H20")], ids=str)
def test_an_unlisted_device_gets_the_heuristic_from_its_limits(device):
    for rows, slots in ((0, 1), (1, 128), (4096, 16)):
        assert get(rows, slots, device) == str(config_for("grouped_gemm", device, BF16, rows * slots, slots))


def test_configs_are_written_and_read():
    for config in (
        GemmConfig(128, 256, 64, 8, 3),
        GemmConfig(64, 32, 16, 4, 2, 4),
        GemmConfig(128, 256, 64, 4, 4, is_specialised=True),
        GemmConfig(128, 256, 64, 4, 4, 16, is_specialised=True),
        BlockConfig(2048, 8),
        BlockConfig(64, 4, 32),
    ):
        assert parse_config(str(config)) == config


@pytest.mark.parametrize(
    ("kernel", "target", "triton", "fault"),
    [
        ("grouped_gemm", "sm_100", (3, 9), ""),
        ("grouped_gemm", "sm_103", (3, 10), ""),
        ("gate_up", "sm_100", (3, 9), "gate_up has none, only grouped_gemm"),
        ("grouped_gemm", "sm_90", (3, 9), "sm_90 must be of Blackwell"),
        ("grouped_gemm", "sm_100", (3, 7), "ws needs Triton 3.9; this is 3.7"),
        ("grouped_gemm", "sm_100", (), "ws needs Triton 3.9; this is none"),
    ],
)
def test_specialised_warps_are_refused_where_there_are_none(kernel, target, triton, fault, monkeypatch):
    monkeypatch.setattr("relibra_kernels.configs.config.version_of", lambda package: triton)
    found = misfit(kernel, parse_config("128x128x64w4s3ws"), DEVICES[target], BF16)
    assert fault in found and bool(found) == bool(fault)
    tried = candidates(kernel, DEVICES[target], BF16)
    assert any(isinstance(one, GemmConfig) and one.is_specialised for one in tried) == (not fault)


ROW_ENTRIES = [
    # kernel, part, (H, I), interleaved; the width that the launch asks by
    ("permute", "unpermute", (2048, 0), False, 2048),
    ("swiglu", "swiglu_backward", (0, 768), True, 768),
    ("replica_reduce", "gate_up", (2048, 768), False, 2048 * 1536),
    ("replica_reduce", "down", (2048, 768), False, 2048 * 768),
    ("grad_bias", "gate_up", (0, 2880), False, 5760),
    ("schedule", "schedule", (0, 0), False, 0),
]


@pytest.mark.parametrize(("kernel", "part", "sizes", "interleaved", "width"), ROW_ENTRIES)
def test_kernels_without_tensor_cores_find_their_part(folders, kernel, part, sizes, interleaved, width):
    entry = Entry(part, "bf16", *sizes, False, interleaved, "compiled", "", None, "2026-11-24", ())
    entry = replace(entry, buckets=(Bucket(1, 4096, "512w2", 1.0),))
    path = path_of(folders[1], "H100", kernel)
    update(path, "H100", kernel, lambda old: merged(old, [entry]))
    lookup.forget()

    def found(width, part):
        return str(lookup.config_of(kernel, H100, BF16, (width, 0), 4096, 1, False, interleaved, part))

    usual = str(config_for(kernel, H100, BF16, 4096, 1))
    asked = part if kernel in ("permute", "swiglu") else ""
    assert found(width, asked) == "512w2" != usual
    assert found(width + 1, asked) == usual
    if asked:
        assert found(width, "pack") == usual


def test_every_launch_of_a_layer_looks_its_config_up(folders):
    """What an override says reaches the launches of every kernel, clamped to their rows."""
    from relibra_kernels.tuning.catalogue import QWEN, Layer, meta_schedule, recorded

    override = "permute=512w2,swiglu=256w1,replica_reduce=2048w4,grad_bias=64x64w4,schedule=512w4"
    layer = Layer(*QWEN, meta_schedule(), replicas=2)
    blocks = {"permute": 512, "swiglu": 256, "replica_reduce": 2048, "grad_bias": 64, "schedule": 512}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELIBRA_CONFIG", override)
        lookup.forget()
        for kernel, parts in PARTS.items():
            for part in parts if kernel in blocks else ():
                launches = recorded(H100, layer.call(kernel, part, None))
                for launch in (launches[0], launches[-1]):
                    names = {"permute": "BLOCK_H", "grad_bias": "BLOCK_N"}
                    assert launch.options[names.get(kernel, "BLOCK")] == blocks[kernel]
    lookup.forget()


def test_a_lookup_takes_microseconds(folders):
    """5 us warm. CPU time and the best of many, so that a busy machine does not decide."""
    put(folders[1], "64x64x64w4s3")
    get()
    best = float("inf")
    for _ in range(20):
        start = time.process_time()
        for _ in range(1000):
            lookup.config_of("grouped_gemm", H100, BF16, (2048, 768), 16384, 16, True)
        best = min(best, time.process_time() - start)
    assert best / 1000 < 5e-6


def test_the_first_lookup_of_a_shipped_file_takes_milliseconds(monkeypatch):
    monkeypatch.undo()
    largest = max(lookup.SHIPPED.glob("*/*.json"), key=lambda path: path.stat().st_size)
    device, entry = device_for(PRODUCTS[largest.parent.name]), None
    entry = load_entries(largest, largest.parent.name, largest.stem)[-1]
    n, d, layout, interleaved = entry.sizes(largest.stem)
    best = float("inf")
    for _ in range(5):
        lookup.forget()
        start = time.process_time()
        lookup.config_of(largest.stem, device, BF16, (n, d), 16384, 16, layout, interleaved)
        best = min(best, time.process_time() - start)
    assert best < 0.05
    lookup.forget()


def test_importing_reads_no_config():
    code = (
        "import sys; opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "import relibra_kernels.nn, relibra_kernels.kernels, relibra_kernels.configs.lookup\n"
        "assert not [name for name in opened if name.endswith('.json') and 'autotune_configs' in name], opened\n"
        "assert any(name.endswith('.py') or name.endswith('.pyc') for name in opened)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
