"""`examples/loggers.py` with the file back ends of the three loggers: what they wrote is read again.

`make test-extras` installs them and runs this; elsewhere a logger that is not there is skipped by name.
"""

import importlib.util
from dataclasses import fields
from pathlib import Path

import pytest

from relibra_kernels.parallel import BatchStats

spec = importlib.util.spec_from_file_location("loggers", Path(__file__).parents[1] / "examples" / "loggers.py")
loggers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loggers)


def make_stats(**known):
    return BatchStats(**dict.fromkeys((field.name for field in fields(BatchStats)), 0) | known)


BATCHES = [
    make_stats(static_max_mean=1.75, planned_max_mean=1.0, compute_seconds=0.5, saved_seconds=0.25, kept_slow_bytes=7),
    make_stats(static_max_mean=None, planned_max_mean=1.25, compute_seconds=0.75, saved_seconds=None),
]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: make test-extras runs this")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step, stats in enumerate(BATCHES):
            loggers.to_tensorboard(writer, stats, step)
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("relibra/compute_seconds")]
    assert found == [(0, 0.5), (1, 0.75)]
    assert [event.value for event in events.Scalars("relibra/saved_seconds")] == [0.25]  # unknown is not logged as zero


def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: make test-extras runs this")
    for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    run = wandb.init(project="relibra", mode="offline", dir=str(tmp_path))
    for step, stats in enumerate(BATCHES):
        loggers.to_wandb(run, stats, step)
    run.finish()
    (written,) = tmp_path.rglob("*.wandb")
    content = written.read_bytes()
    assert b"relibra/static_max_mean" in content and content.count(b"relibra/compute_seconds") >= len(BATCHES)
    assert all(value in content for value in (b"1.75", b"0.75", b"1.25"))  # values are written as JSON


def test_prometheus(tmp_path):
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed: make test-extras runs this")
    from prometheus_client.parser import text_string_to_metric_families

    path = tmp_path / "relibra.prom"
    for stats in BATCHES:
        loggers.to_prometheus(str(path), stats)
    found = {metric.name: metric.samples[0].value for metric in text_string_to_metric_families(path.read_text())}
    assert found["relibra_planned_max_mean"] == 1.25 and found["relibra_compute_seconds"] == 0.75
    assert found.keys() == {f"relibra_{name}" for name in BATCHES[1].scalars()}
