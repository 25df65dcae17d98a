"""The search offline: what is never chosen, stopping and going on, and skewed routing."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from relibra_kernels.cli import main
from relibra_kernels.configs.config import ROW_KERNELS, BlockConfig, parse_config
from relibra_kernels.configs.limits import device_for
from relibra_kernels.configs.products import PRODUCTS
from relibra_kernels.configs.spaces import SPACE, candidates
from relibra_kernels.form import ExpertForm
from relibra_kernels.kernels.constants import block_of
from relibra_kernels.planner import RoutingTrace
from relibra_kernels.planner.errors import InputError
from relibra_kernels.tuning import compile_pool as pool
from relibra_kernels.tuning import reports
from relibra_kernels.tuning.catalogue import PARTS
from relibra_kernels.tuning.compile_pool import compiled
from relibra_kernels.tuning.compile_task import Task, digest_of
from relibra_kernels.tuning.launch_model import Resources
from relibra_kernels.tuning.models import MODELS, Model, model_named
from relibra_kernels.tuning.ranking import estimate
from relibra_kernels.tuning.reports import Reports
from relibra_kernels.tuning.search import OfflineSearch
from relibra_kernels.tuning.search_goal import goals

QWEN = MODELS[0]
H100 = PRODUCTS["H100"]
FREE = Resources(64, 0, 1, 16)
CRASHING = [sys.executable, str(Path(__file__).parents[2] / "support" / "crashing_compiler.py")]
RECORDED = Path(__file__).parents[4] / "shared/data/gptoss20b_routing.npz"


def needs(task: Task) -> Resources | str:
    """A compiler that is no compiler: bigger accumulators need more registers, and some things go wrong."""
    config = parse_config(task.config)
    if isinstance(config, BlockConfig):
        return Resources(16 + config.columns // (config.num_warps * 32), 0, 0, 64)
    if config.block_k == 128:
        return "PTXASError: too much"
    accumulators = config.block_m * config.block_n // (config.num_warps * 32)
    spill = 16 if accumulators >= 128 and task.replicas else 0
    return Resources(64 + accumulators, spill, 1000 * config.num_stages, 16 // config.num_warps * config.num_warps)


def instead(find):
    """`pool.compiled` with `find` for a compiler, in this process."""

    def run(tasks, jobs, stop):
        for task in tasks:
            if stop():
                return
            yield task, find(task)

    return run


@pytest.fixture
def search(tmp_path, monkeypatch):
    def make(model=QWEN, product=H100, find=needs, trace=None, tokens=(8192,), kernels=("gate_up", "grouped_gemm")):
        monkeypatch.setattr(reports, "compiled", instead(find))
        found = goals(model, tokens, trace, kernels)
        return OfflineSearch(product, [model], found, Reports(tmp_path / "state", product.target))

    return make


def test_what_spills_does_not_fit_or_fails_is_never_chosen(search, tmp_path):
    """Of its two variants one is enough to rule a config out."""
    ruined = {"spill": Resources(255, 16, 1, 8), "shared": Resources(64, 0, 1 << 20, 8), "error": "OutOfMemory: no"}
    free = search(find=lambda task: FREE)
    free.run()
    goal = free.goals[0]
    winner = str(free.rank(goal)[0][1])
    for name, outcome in ruined.items():

        def find(task, outcome=outcome):
            return outcome if task.config == winner and task.replicas else FREE

        hurt = search(find=find)
        hurt.reports = Reports(tmp_path / name, "sm_90")
        hurt.run()
        ranked = hurt.rank(goal)
        assert str(ranked[0][1]) != winner and winner not in {str(config) for _, config in ranked}
        assert ranked[0][0] >= free.rank(goal)[0][0]
        assert bool(hurt.failed) == (name == "error")


def test_a_winner_that_spills_at_its_own_sizes_is_replaced(search, tmp_path):
    """The stand-in's report is a first guess: what wins is compiled with the model's sizes."""
    model = Model("wide", 4096, 1408, 64, 8)
    first = search(model)
    entries = first.run()
    winner = entries["gate_up"][0].buckets[-1].config

    def find(task):
        own = (task.hidden_size, task.intermediate_size) == (4096, 1408)
        return Resources(255, 64, 1, 8) if own and task.config == winner else needs(task)

    again = search(model, find=find)
    again.reports = Reports(tmp_path / "again", "sm_90")
    assert all(bucket.config != winner for entry in again.run()["gate_up"] for bucket in entry.buckets)


def test_what_spills_under_another_triton_is_left_out(search):
    """Interleaved gate_up at 128x128 on an A100: 8 bytes under 3.9, none here. Concatenated it stays."""
    config = "128x128x64w8s3"
    for name, offered in (("gpt-oss-120b", False), ("Qwen3-30B-A3B", True)):
        found = search(model_named(name), PRODUCTS["A100"], find=lambda task: FREE, kernels=("gate_up",))
        found.run()
        names = {str(replace(ranked, group_m=8)) for _, ranked in found.rank(found.goals[-1])}
        assert (config in names) == offered and len(names) > 4


def run_cli(out, *more):
    common = ["tune", "--shape", "2048,768,32,4", "--device", "h100", "--tokens", "512", "4096", "--jobs", "1"]
    return main([*common, "--out", str(out), *more])


def files(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.glob("*/*.json")}


def test_one_kernel_alone_is_tuned(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "compiled", instead(needs))
    assert run_cli(tmp_path, "--kernel", "grad_weight", "--kernel", "schedule") == 0
    assert set(files(tmp_path)) == {"H100/grad_weight.json", "H100/schedule.json"}


def test_stopped_half_way_and_resumed_it_writes_the_same_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reports, "compiled", instead(needs))
    assert run_cli(tmp_path / "whole") == 0
    whole = files(tmp_path / "whole")
    assert set(whole) == {f"H100/{kernel}.json" for kernel in PARTS if kernel != "grad_bias"}  # there are no biases

    compiled_now = []

    def stops_after(count):
        def find(task):
            if len(compiled_now) == count:
                raise KeyboardInterrupt
            compiled_now.append(task.key)
            return needs(task)

        return find

    for interrupted in range(4):
        monkeypatch.setattr(reports, "compiled", instead(stops_after(15 * (interrupted + 1))))
        assert run_cli(tmp_path / "parts", "--resume") == 130
        assert not files(tmp_path / "parts")
    state = next((tmp_path / "parts" / ".tune").iterdir())
    state.write_text(state.read_text() + '["torn line')
    assert "candidates left; go on with --resume" in capsys.readouterr().err
    monkeypatch.setattr(reports, "compiled", instead(stops_after(10**6)))
    assert run_cli(tmp_path / "parts", "--resume") == 0
    assert files(tmp_path / "parts") == whole
    assert len(compiled_now) == len(set(compiled_now))  # nothing twice

    before = len(compiled_now)
    assert run_cli(tmp_path / "parts", "--resume") == 0 and len(compiled_now) == before
    assert files(tmp_path / "parts") == whole
    assert run_cli(tmp_path / "parts") == 0 and len(compiled_now) > before  # without --resume: anew


def test_a_budget_stops_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "compiled", instead(needs))
    assert run_cli(tmp_path, "--budget", "1e-9") == 3
    assert not files(tmp_path)


BAD = [
    (["--model", "Qwen9", "--device", "H100"], "model is 'Qwen9', but must be one of Qwen3-30B-A3B, Qwen3-235B-A22B"),
    (["--model", "OLMoE", "--device", "H900"], r"device is 'H900' \(did you mean H200\?\), but must be one of A100"),
    (["--model", "OLMoE"], "device is 'auto', but there is no GPU here"),
    (["--device", "H100"], "neither --model nor --shape is given"),
    (["--shape", "1,2,3", "--device", "H100"], "shape is '1,2,3'; it must be H,I,E,K"),
    (["--shape", "64,64,4,8", "--device", "H100"], "K at most E"),
    (["--shape", "0,64,4,2", "--device", "H100"], "must be positive"),
    (["--model", "OLMoE", "--device", "H100", "--tokens", "0"], r"--tokens is \[0\]"),
    (["--model", "OLMoE", "--device", "H100", "--jobs", "0"], "--jobs is 0"),
    (["--model", "OLMoE", "--device", "H100", "--budget", "-1"], "--budget -1.0"),
    (["--model", "OLMoE", "--device", "H100", "--trace", "no.npz"], "no.npz"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for auto")
@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_refused(capsys, arguments, message):
    import re

    assert main(["tune", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert run_cli(tmp_path / "out") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_file_in_place_of_the_folder_is_named(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert run_cli(tmp_path / "out") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_trace_for_another_model_is_refused(small_trace):
    with pytest.raises(InputError, match="trace is of 4 experts; Qwen3-30B-A3B has 128"):
        goals(QWEN, trace=small_trace)


def test_outcomes_belong_to_their_tasks_and_crashes_cost_one_config(monkeypatch):
    monkeypatch.setattr(pool, "WORKER", CRASHING)
    names = ["128x64x64w4s2", "64x64x64w4s3", "64x64x64w4s2", "256x64x64w4s2", "512x64x64w4s2"]
    tasks = [Task("sm_90", "gate_up", "gate_up", name, 64, 64 + i, ExpertForm(), 0) for i, name in enumerate(names)]
    found = dict(compiled(tasks, 2, lambda: False))
    assert set(found) == set(tasks)
    for task, outcome in found.items():
        if task.config == "64x64x64w4s2":
            assert outcome == "the compiler ended its process with status 1"
        elif task.config == "64x64x64w4s3":
            assert outcome == "PTXASError: no"
        else:
            assert outcome.registers == int(task.config.split("x")[0])


def test_the_real_compiler_in_a_worker_says_what_it_says_here():
    """Two good configs and one that is refused; none of the caller's main module runs in a worker."""
    from relibra_kernels.tuning.compile_task import compile_task

    tasks = [
        Task("gfx942", "grouped_gemm", "dx", name, 64, 64, ExpertForm(), 0) for name in ("64x64x32w4s2", "48x64x32w4s2")
    ]
    found = {task.config: outcome for task, outcome in compiled(tasks, 1, lambda: False)}
    assert found["64x64x32w4s2"] == compile_task(tasks[0])
    assert isinstance(found["48x64x32w4s2"], str) and "power of 2" in found["48x64x32w4s2"]


def test_a_digest_names_what_is_compiled():
    base = Task("sm_90", "grouped_gemm", "down", "128x128x64w8s3", 2048, 768, ExpertForm(), 0)
    others = [
        Task("sm_90", "grouped_gemm", "dx", "128x128x64w8s3", 2048, 768, ExpertForm(), 0),
        Task("sm_90", "grouped_gemm", "down", "128x128x64w8s4", 2048, 768, ExpertForm(), 0),
        Task("sm_90", "grouped_gemm", "down", "128x128x64w8s3", 2048, 1536, ExpertForm(), 0),
        Task("sm_90", "grouped_gemm", "down", "128x128x64w8s3", 2048, 768, ExpertForm(), 2),
        Task("sm_80", "grouped_gemm", "down", "128x128x64w8s3", 2048, 768, ExpertForm(), 0),
    ]
    assert len({digest_of(task) for task in (base, *others)}) == 6


@pytest.mark.parametrize("kernel", ["permute", "swiglu"])
def test_no_two_configs_are_the_same_launch(kernel):
    """A block takes no more warps than it has 16 bytes for."""
    for product in PRODUCTS.values():
        configs = candidates(kernel, device_for(product), torch.bfloat16)
        assert len({block_of(config, 1 << 20, 2) for config in configs}) == len(configs) > 4


@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_kernels_without_tensor_cores_are_ranked_and_stored(search, kernel):
    """All parts, under sizes by which a launch finds them; what spills is not chosen."""
    model = model_named("gpt-oss-120b")

    def find(task):
        return Resources(255, 8, 0, 8) if task.config == usual else Resources(32, 0, 0, 64)

    usual = str(SPACE[kernel][0])
    entries = search(model, find=find, kernels=(kernel,)).run()[kernel]
    assert {entry.part for entry in entries} == set(PARTS[kernel])
    assert all(bucket.config != usual for entry in entries for bucket in entry.buckets)
    width = {"permute": 2880, "swiglu": 2880, "schedule": 0}
    for entry in entries:
        columns = 5760 if entry.part == "gate_up" else 2880
        expected = width.get(kernel, columns * (2880 if kernel == "replica_reduce" else 1))
        assert entry.sizes(kernel) == (expected, 0, False, kernel == "swiglu")
        assert (entry.H == 0) == (kernel in ("swiglu", "schedule") or (kernel, entry.part) == ("grad_bias", "gate_up"))


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=lambda product: product.name)
def test_uneven_groups_never_make_it_pad_more_than_the_balanced_choice(search, product):
    """On recorded routing where it is at hand, else on log-normal groups."""
    trace = RoutingTrace.load(RECORDED) if RECORDED.exists() else None
    model = Model("gpt-oss-20b", 2880, 2880, 32, 4)
    found = search(model, product, find=lambda task: FREE, trace=trace, tokens=(256, 1024, 8192))
    found.run()
    device = device_for(product)
    chosen = found.choose()
    for goal in found.goals:
        even, *uneven = goal.works(device)
        configs = candidates(goal.kernel, device, torch.bfloat16)
        for_even = min(configs, key=lambda config, even=even: round(estimate(even, config, FREE, product).us, 2))

        def padded(config, uneven=uneven):
            return sum(estimate(work, config, FREE, product).padded_rows for work in uneven)

        us, config = chosen[id(goal)]
        assert padded(config) <= padded(for_even) and us <= 1.03 * found.rank(goal)[0][0]
