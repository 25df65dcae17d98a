"""Measuring, with a clock that is told what to say: what is kept, what is recorded, stopping and going on."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from relibra_kernels.cli import main
from relibra_kernels.configs import lookup
from relibra_kernels.configs.config import GemmConfig, parse_config
from relibra_kernels.configs.files import load_entries, path_of
from relibra_kernels.configs.limits import DEVICES, device_for
from relibra_kernels.configs.products import PRODUCTS
from relibra_kernels.configs.spaces import config_for
from relibra_kernels.tuning import measured_inputs as workloads
from relibra_kernels.tuning.journal import Journal
from relibra_kernels.tuning.measure import OnlineSearch, OutOfTime, Timing
from relibra_kernels.tuning.models import Model
from relibra_kernels.tuning.search_goal import goals

H100 = device_for(PRODUCTS["H100"])
UNLISTED = replace(DEVICES["sm_89"], product="NVIDIA-GeForce-RTX-4090", programs=128)
MODEL = Model("small", 512, 256, 8, 2)


class Clock:
    """Times by config; `even` and `uneven` scale the group tables; `broken` configs raise."""

    def __init__(self, times=None, spread=0.01, broken=()):
        self.times, self.spread, self.broken = times or {}, spread, broken
        self.timed, self.restored, self.prepared = [], 0, 0

    def prepare(self, goal):
        self.prepared += 1
        factors = (1.0, *[3.0] * (len(goal.groups) - 1))
        return [SimpleNamespace(call=lambda config, f=f: (config, f), restore=self._restore) for f in factors]

    def _restore(self):
        self.restored += 1

    def bench(self, call):
        config, factor = call
        self.timed.append(str(config))
        if str(config) in self.broken:
            raise RuntimeError("out of resource: shared memory\nand a long story")
        median = factor * self.times.get(str(config), 100.0)
        return Timing(median, median * (1 - self.spread / 2), median * (1 + self.spread / 2))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RELIBRA_CONFIG_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path / "nothing shipped")
    lookup.forget()
    yield
    lookup.forget()


def search(tmp_path, clock, device=H100, **more):
    found = goals(MODEL, [2048], kernels=["grouped_gemm"])
    return OnlineSearch(device, found, Journal(tmp_path / "journal.jsonl"), clock.prepare, clock.bench, **more)


def test_the_fastest_is_kept_with_its_time(tmp_path):
    clock = Clock({"128x256x64w8s3": 50.0})
    found = search(tmp_path, clock)
    incumbent = str(found.incumbent(found.goals[0]))
    assert incumbent == str(config_for("grouped_gemm", H100, torch.bfloat16, 4096, 2))
    clock.times = {incumbent: 80.0, "128x128x64w8s4": 50.0, "64x64x64w4s4": 49.9}
    config, timing = found.measure(found.goals[0])
    rivals = {str(config) for config in found.candidates(found.goals[0])}
    fastest = "64x64x64w4s4" if "64x64x64w4s4" in rivals else "128x128x64w8s4"
    assert str(config) == fastest
    even, uneven = clock.times[fastest], 3 * clock.times[fastest]
    assert timing.us == pytest.approx((even + uneven) / 2) and timing.spread == pytest.approx(0.01)
    assert clock.restored == len(clock.timed) and clock.prepared == 1


NOISE = [(0.05, 0.01, True), (0.05, 0.06, False), (0.0, 0.0, False)]


@pytest.mark.parametrize(("faster_by", "spread", "replaced"), NOISE)
def test_noise_replaces_nothing(tmp_path, faster_by, spread, replaced):
    found = search(tmp_path, clock := Clock(spread=spread))
    goal = found.goals[0]
    incumbent, rival = found.candidates(goal)[:2]
    clock.times = {str(rival): 100.0 * (1 - faster_by)}
    assert found.measure(goal)[0] == (rival if replaced else incumbent)


def test_a_config_that_fails_is_recorded_and_not_tried_again(tmp_path):
    found = search(tmp_path, clock := Clock())
    goal = found.goals[0]
    incumbent, rival = found.candidates(goal)[:2]
    clock.broken = (str(rival),)
    clock.times = {str(rival): 1.0}
    assert found.measure(goal)[0] == incumbent
    assert list(found.failed.values()) == ["RuntimeError: out of resource: shared memory"]
    again = search(tmp_path, later := Clock())
    assert again.measure(goal)[0] == incumbent and not later.timed and len(again.failed) == 1
    # where what is used now is what fails, the best of the others takes its place
    clock.broken = (str(incumbent),)
    other = OnlineSearch(H100, found.goals, Journal(tmp_path / "other.jsonl"), clock.prepare, clock.bench)
    assert other.measure(goal)[0] == rival


def test_a_launch_without_memory_for_its_inputs_is_skipped(tmp_path):
    def no_memory(goal):
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = search(tmp_path, clock := Clock())
    found.prepare = no_memory
    entries, left = found.run("3.7.1", "570", "2026-11-24")
    assert entries == {} and left == 0 and not clock.timed
    assert set(found.failed.values()) == {"OutOfMemoryError: CUDA out of memory"}


def test_a_budget_stops_and_the_rest_is_timed_later(tmp_path):
    whole = search(tmp_path / "whole", Clock({"64x128x64w4s3": 20.0}))
    expected, left = whole.run("3.7.1", "570", "2026-11-24")
    assert left == 0 and len(expected["grouped_gemm"]) == len(whole.goals)

    seconds = iter(range(10**6))
    timed = []
    for end in (5, 17, 10**6):
        clock = Clock({"64x128x64w4s3": 20.0})
        part = search(tmp_path, clock, out_of_time=lambda end=end: next(seconds) > end)
        entries, left = part.run("3.7.1", "570", "2026-11-24")
        assert (left > 0) == (end < 10**6)
        timed += clock.timed
    assert entries == expected
    assert len(timed) == 2 * len(set(Journal(tmp_path / "journal.jsonl").known))  # two tables each, nothing twice
    with pytest.raises(OutOfTime):
        search(tmp_path / "none", Clock(), out_of_time=lambda: True).measure(whole.goals[0])


def test_a_listed_gpu_is_spared_what_the_model_finds_hopeless(tmp_path):
    listed, unlisted = search(tmp_path, Clock()), search(tmp_path, Clock(), UNLISTED)
    goal = listed.goals[0]
    assert 2 <= len(listed.candidates(goal)) < len({*listed.candidates(goal), *unlisted.candidates(goal)})
    assert listed.candidates(goal)[0] == listed.incumbent(goal)
    assert len(set(listed.candidates(goal))) == len(listed.candidates(goal))


@pytest.mark.parametrize("device", [H100, UNLISTED], ids=lambda device: device.product)
def test_the_command_on_a_gpu_writes_what_is_looked_up_next(tmp_path, monkeypatch, capsys, device):
    """`relibra tune` in one line, on a listed GPU and on one that nobody has heard of; GPU and clock are stand-ins."""
    from relibra_kernels.configs import limits

    clock = Clock(broken=("64x64x64w4s4",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(limits, "device_of", lambda where: device)
    monkeypatch.setattr(workloads, "prepare", clock.prepare)
    monkeypatch.setattr(workloads, "bench", clock.bench)
    command = ["tune", "--shape", "512,256,8,2", "--tokens", "2048"]
    before = lookup.config_of("gate_up", device, torch.bfloat16, (256, 512), 4096, 8, True)
    rival = next(c for c in (GemmConfig(64, 64, 64, 4, 2), GemmConfig(64, 64, 64, 4, 3)) if c != before)
    clock.times = {str(rival): 10.0}
    assert main(command) == 0
    assert "64x64x64w4s4: RuntimeError: out of resource" in capsys.readouterr().err
    assert lookup.config_of("gate_up", device, torch.bfloat16, (256, 512), 4096, 8, True) == rival
    path = path_of(lookup.user_folder(), device.product, "gate_up")
    (entry,) = load_entries(path, device.product, "gate_up")
    assert (entry.evidence, entry.buckets[0].spread) == ("measured", 0.01) and entry.driver
    timed = len(clock.timed)
    assert main([*command, "--resume"]) == 0 and len(clock.timed) == timed
    assert main([*command, "--budget", "1e-9"]) == 3
    assert "launches left; go on with --resume" in capsys.readouterr().err
    monkeypatch.setattr(workloads, "bench", lambda call: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(command) == 130


def test_inputs_of_the_clock(monkeypatch):
    """Enough copies to leave L2, in turn; the group sizes as asked for; sums back to zero. In memory, on the CPU."""
    from relibra_kernels import kernels, reference

    monkeypatch.setattr(workloads.kernels, "build_schedule", reference.build_schedule)
    used = []
    monkeypatch.setattr(kernels, "grad_weight", lambda *_, grad, config, **__: used.append((grad, config)))
    (goal,) = [g for g in goals(MODEL, [16], kernels=["grad_weight"]) if (g.part, g.slots) == ("down", 2)]
    rows = np.array([5, 0, 9])
    workload = workloads.RotatingWorkload(goal, rows, torch.device("cpu"), 5_000_000)
    schedule = workload.calls[0].args[2]
    assert schedule.slot_offsets.tolist() == [0, 5, 5, 14] and schedule.num_rows == 14
    made = 2 * (7 * 512 + 14 * 256) + 4 * 3 * 512 * 256  # dout, w*a and the fp32 sum
    assert len(workload.calls) == 2 * 5_000_000 // made + 1 > 2
    config = parse_config("128x128x64w8s3")
    call = workload.call(config)
    for _ in range(len(workload.calls) + 1):
        call()
    buffers = [buffer.data_ptr() for buffer, _ in used]
    assert len(set(buffers)) == len(workload.calls) and buffers[0] == buffers[-1]
    assert {chosen for _, chosen in used} == {config}
    used[0][0].fill_(7)
    workload.restore()
    assert not used[0][0].any() and used[0][0].dtype == torch.float32


def test_models_with_other_rows_a_token_are_timed_apart(tmp_path):
    """permute moves K rows a token: of the same H and tokens, another K is another thing to time."""
    found = search(tmp_path, Clock())
    eight, six = (
        next(goal for goal in goals(Model("m", 512, 256, 8, top_k), [2048], kernels=["permute"])) for top_k in (8, 6)
    )
    config = found.candidates(eight)[0]
    assert found._key(eight, config) != found._key(six, config)
