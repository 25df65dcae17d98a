"""Where the figures of a batch go: `ep.stats()` in TensorBoard, Weights & Biases and Prometheus.

After every batch, `stats = ep.stats()` on all ranks (it is collective), then one of these where you log::

    writer = SummaryWriter("runs/planned")           # torch.utils.tensorboard; pip install tensorboard
    to_tensorboard(writer, stats, step)

    run = wandb.init(project="moe-rl")               # pip install wandb
    to_wandb(run, stats, step)

    to_prometheus("/var/lib/node_exporter/relibra.prom", stats)   # pip install prometheus-client

Without any of them: write `ep.stats_line()` to a file, a line a batch, and look at it with `relibra watch RUN.jsonl`.
"""

from typing import Any

from relibra_kernels.parallel import BatchStats


def to_tensorboard(writer: Any, stats: BatchStats, step: int) -> None:
    """Into a `SummaryWriter`."""
    for name, value in stats.scalars().items():
        writer.add_scalar(f"relibra/{name}", value, step)


def to_wandb(run: Any, stats: BatchStats, step: int) -> None:
    """Into what `wandb.init` returned."""
    run.log({f"relibra/{name}": value for name, value in stats.scalars().items()}, step=step)


def to_prometheus(path: str, stats: BatchStats) -> None:
    """Into a file for node_exporter's textfile collector, whole or not at all; a file a rank."""
    from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

    registry = CollectorRegistry()
    for name, value in stats.scalars().items():
        Gauge(f"relibra_{name}", "of the last batch, see BatchStats", registry=registry).set(value)
    write_to_textfile(path, registry)
