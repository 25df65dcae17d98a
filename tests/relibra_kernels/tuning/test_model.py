"""The model orders constructed cases as anyone would, and counts what can be counted by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs triton")

from relibra_kernels.compiling.machine_code import MachineCode
from relibra_kernels.configs.config import GemmConfig, parse_config
from relibra_kernels.configs.products import PRODUCTS
from relibra_kernels.kernels.schedule import MOST_COUNTED
from relibra_kernels.planner import InputError
from relibra_kernels.tuning.gemm_model import tile_columns
from relibra_kernels.tuning.launch_model import LAUNCH_US, Resources, Work, balanced, skewed
from relibra_kernels.tuning.models import MODELS, model_named
from relibra_kernels.tuning.ranking import estimate
from relibra_kernels.tuning.search_goal import goals, recorded

H100 = PRODUCTS["H100"]
ROOMY = Resources(registers=128, spill_bytes=0, shared_bytes=64 * 1024, warps_per_sm=16)
WORK = Work("grouped_gemm", 1024, 2048, False, balanced(16, 1024))


def us(config, work=WORK, product=H100, resources=ROOMY):
    return estimate(work, parse_config(config), resources, product).us


def test_waves_and_padded_rows_are_counted():
    rows = np.array([0, 1, 128, 129])  # 0, 1, 1 and 2 tiles of 128 rows
    found = estimate(Work("grouped_gemm", 300, 64, False, rows), GemmConfig(128, 128, 64, 8, 3), ROOMY, H100)
    assert (found.waves, found.padded_rows) == (1, 4 * 128 - 258)
    # 132 tiles are one wave of 132 SMs, 133 are two
    for tiles, waves in ((132, 1), (133, 2)):
        work = Work("grouped_gemm", 128, 64, False, np.full(tiles, 128))
        assert estimate(work, GemmConfig(128, 128, 64, 8, 3), ROOMY, H100).waves == waves


def test_fewer_waves_are_faster():
    """One more tile than there are SMs: columns of 128 need two waves, columns of 256 one."""
    work = Work("grouped_gemm", 256, 8192, False, np.full(66, 128 + 1))
    narrow, wide = GemmConfig(128, 128, 64, 8, 3), GemmConfig(128, 256, 64, 8, 3)
    assert estimate(work, narrow, ROOMY, H100).waves == 2 and estimate(work, wide, ROOMY, H100).waves == 1
    one, two = (Work("grouped_gemm", 128 * columns, 8192, False, np.array([256])) for columns in (66, 67))
    assert estimate(two, narrow, ROOMY, H100).us > 1.7 * estimate(one, narrow, ROOMY, H100).us


def test_each_part_of_the_model_shows():
    assert us("128x128x64w8s3") > us("128x256x64w8s3")  # bytes from L2 per product
    assert us("128x128x64w8s2") > us("128x128x64w8s3")  # loads in flight
    tight = Resources(255, 0, 64 * 1024, 4)
    assert us("64x128x64w4s2", resources=tight) > us("64x128x64w4s2")  # programs that share an SM
    few_rows = Work("grouped_gemm", 1024, 2048, False, balanced(16, 40))
    assert us("128x128x64w8s3", few_rows) > us("64x128x64w8s3", few_rows)  # rows that are only padding
    gathered = Work("grouped_gemm", 1024, 2048, True, balanced(16, 1024))
    assert us("128x128x32w8s4", gathered) > us("128x128x64w8s4", gathered)  # pieces of a line
    assert us("128x128x64w8s3", product=PRODUCTS["A100"]) > us("128x128x64w8s3")
    cold = Work("grouped_gemm", 4096, 4096, False, balanced(128, 1))
    assert estimate(cold, GemmConfig(64, 128, 64, 4, 3), ROOMY, H100).bound == "DRAM"


def test_half_a_tile_takes_more_than_half_the_time_of_a_whole_one():
    """Where Hopper's shared memory is slower than its products: 160 bytes for the 128 that move in a clock."""
    config = parse_config("128x256x64w8s3")
    columns = [tile_columns("grad_hidden", count, config, H100) for count in (1280, 1281, 1408, 1409)]
    assert columns == pytest.approx([5, 5.625, 5.625, 6])
    for kernel, n, d in (("grad_hidden", 1408, 8192), ("grad_weight", 8192, 1408)):
        half, whole = (
            Work(kernel, *sizes, True, balanced(64, 4096)) for sizes in ((n, d), (max(n, 1409), max(d, 1409)))
        )
        assert estimate(half, config, ROOMY, H100).us < 0.98 * estimate(whole, config, ROOMY, H100).us


def test_blackwell_wants_128_rows_a_tile():
    b200 = PRODUCTS["B200"]
    long = Work("grouped_gemm", 4096, 4096, False, balanced(16, 4096))
    assert us("64x256x64w8s3", long, b200) > 1.5 * us("128x256x64w8s3", long, b200)


def test_specialised_warps_hide_the_shorter_of_multiplying_and_storing():
    work, code = Work("grouped_gemm", 4096, 4096, False, balanced(16, 4096)), MachineCode(buffers=(4, 4))
    config, b200 = GemmConfig(128, 256, 64, 4, 4), PRODUCTS["B200"]
    config = replace(config, is_specialised=True)

    def us(epilogue):
        needs = Resources(255, 0, 1 << 17, 8, replace(code, epilogue_instructions=epilogue))
        return estimate(work, config, needs, b200).us

    assert us(8000) == us(0) < us(1 << 17)  # 64 steps take 32768 clocks


def test_weight_gradients_wait_for_the_longest_slot():
    even = Work("grad_weight", 256, 256, False, balanced(16, 1024))
    rows = np.array([16 * 1024 - 15] + [1] * 15)
    config = GemmConfig(128, 128, 64, 8, 3)
    uneven = estimate(Work("grad_weight", 256, 256, False, rows), config, ROOMY, H100)
    assert uneven.us > 3 * estimate(even, config, ROOMY, H100).us


@pytest.mark.parametrize("kernel", ["grouped_gemm", "gate_up", "grad_hidden", "grad_weight"])
@pytest.mark.parametrize("rows", [[0, 0], [1], [0, 1 << 20]])
def test_any_group_sizes_have_a_time(kernel, rows):
    found = estimate(Work(kernel, 100, 100, True, np.array(rows)), GemmConfig(64, 64, 32, 4, 2), ROOMY, H100)
    assert np.isfinite(found.us) and found.us > 0 and found.padded_rows >= 0


def test_uneven_groups_have_the_mean_and_the_published_skew():
    for slots, mean in ((1, 7), (3, 16), (128, 4096), (2, 0)):
        rows = skewed(slots, mean)
        assert rows.sum() == slots * mean and (rows >= 0).all() and (np.diff(rows) <= 1).all()
    assert 7 < skewed(128, 4096).max() / 4096 < 7.6


def test_recorded_groups_have_the_mean_and_the_shape(small_trace):
    for slots, mean in ((4, 100), (2, 64), (16, 8)):
        tables = recorded(small_trace, slots, mean)
        assert all(table.sum() == slots * mean and len(table) == slots for table in tables)
    first = recorded(small_trace, 4, 100)[0]
    assert first[0] > first[3]  # expert 0 is hot in the first layer


def test_tokens_choose_the_buckets():
    found: dict[str, set] = {}
    for goal in goals(MODELS[0], tokens=[8192]):
        found.setdefault(goal.kernel, set()).add((goal.slots, goal.rows_per_slot))
    by_slots = {(2, 32768), (8, 8192), (32, 2048), (128, 512)}  # 8192 * 8 rows
    assert found == {
        **dict.fromkeys(("schedule", "gate_up", "grouped_gemm", "grad_hidden", "grad_weight"), by_slots),
        "permute": {(1, 8192)},
        "swiglu": {(1, 65536)},
        "replica_reduce": {(1, 1)},
    }
    assert "grad_bias" in {goal.kernel for goal in goals(model_named("gpt-oss-120b"), tokens=[8192])}


def test_experts_without_a_gate_are_not_taken_for_gated_ones(tmp_path):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    config = {**sizes, "num_attention_heads": 4, "num_hidden_layers": 2, "mlp_hidden_act": "relu2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="whose experts have no gate"):
        model_named(str(tmp_path / "config.json"))


def row_us(part, config, *, kernel="permute", n=2048, rows=8192, top_k=8, resources=ROOMY, product=H100):
    work = Work(kernel, n, 0, False, np.array([rows]), part, top_k)
    return estimate(work, parse_config(config), resources, product).us


def test_rows_cost_their_bytes():
    """8192 tokens of 2048 bf16, read once and written 8 times: 9 * 32 MiB, at 3.35 TB/s of DRAM 90 us."""
    assert 90 < row_us("pack", "1024w4") < 110
    assert row_us("pack", "1024w4", rows=16384) == pytest.approx(2 * row_us("pack", "1024w4"), rel=0.05)
    assert row_us("pack", "1024w4", product=PRODUCTS["H200"]) < row_us("pack", "1024w4")


def test_blocks_that_do_not_fit_a_row_compute_for_nothing():
    """Where operations are what takes the time, half a block takes as long as a whole one."""
    light = Resources(registers=32, spill_bytes=0, shared_bytes=0, warps_per_sm=64)
    b200 = {"kernel": "swiglu", "rows": 1 << 16, "product": PRODUCTS["B200"], "resources": light}
    half, whole = (row_us("swiglu", "1024w4", n=n, **b200) for n in (513, 1024))
    assert half > 0.8 * whole
    assert row_us("swiglu", "256w1", n=768, **b200) < row_us("swiglu", "1024w4", n=768, **b200)


def test_few_programs_wait_for_their_loads():
    """One token: a row in 16 steps, each of which waits, against a row at once."""
    slow, fast = (row_us("unpermute", config, n=8192, rows=1) for config in ("512w1", "8192w8"))
    assert slow > 1.5 * fast
    tight = Resources(255, 0, 0, 4)  # one program an SM
    assert row_us("unpermute", "512w4", resources=tight) > row_us("unpermute", "512w4")


def test_a_schedule_trades_the_scan_against_the_sort():
    """More blocks: a longer scan by one program. Larger ones: a longer sort."""
    few, many = np.full(8, 1024), np.full(512, 4096)

    def us(rows, config):
        return estimate(Work("schedule", 0, 0, False, rows, "schedule"), parse_config(config), ROOMY, H100).us

    assert us(few, "512w4") < us(few, "2048w4")
    assert us(many, "4096w8") < us(many, "512w4")


def test_a_small_schedule_is_one_launch():
    """Up to 65536 assignments; every block counts all of them, so it takes longer the more there are."""

    def us(assignments, config="1024w4"):
        work = Work("schedule", 0, 0, False, np.array([assignments]), "schedule")
        return estimate(work, parse_config(config), ROOMY, H100).us

    assert us(MOST_COUNTED + 1) > us(1) + 2 * LAUNCH_US
    counting = [us(32768) - us(16384), us(65536) - us(32768)]
    assert 0 < counting[0] < 0.6 * counting[1]
    assert us(65536, "4096w8") == us(65536, "1024w8")  # a block of 4096 is one of 1024


def test_a_bias_gradient_waits_for_the_longest_slot():
    def us(rows, config="32x128w4"):
        return estimate(Work("grad_bias", 5760, 0, False, rows, "gate_up"), parse_config(config), ROOMY, H100).us

    assert us(np.array([16 * 256 - 15] + [1] * 15)) > 2 * us(np.full(16, 256))
    assert us(np.full(16, 4096), "256x32w8") < us(np.full(16, 4096))  # fewer steps
