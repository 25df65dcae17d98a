"""Training that is saved and goes on elsewhere, run on every rank of a group."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from toy_training import Case, start, train_steps

from relibra_kernels.parallel import ExpertParallel
from relibra_kernels.planner import ReLibraError


def logical_state(ep: ExpertParallel, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Parameters and optimizer state of the whole model, in logical order."""
    state = {f"model.{name}": value.numpy().copy() for name, value in ep.named_logical_parameters()}
    for key in ("exp_avg", "exp_avg_sq", "step"):

        def of(parameter: torch.nn.Parameter, key: str = key) -> torch.Tensor:
            value = optimizer.state[parameter][key]
            return value if key != "step" else value.expand_as(parameter)

        state |= {f"optimizer.{name}.{key}": v.numpy().copy() for name, v in ep.named_logical_parameters(of)}
    return state


def train_and_save(case: Case, folder: str, steps: int) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Train some steps, which leaves the experts shuffled, save, and go on; the state saved, and the rest's results."""
    ep, optimizer = start(case)
    train_steps(case, ep, optimizer, range(steps))
    ep.save_checkpoint(Path(folder) / "step", optimizer)
    saved = logical_state(ep, optimizer)
    return saved, train_steps(case, ep, optimizer, range(steps, case.steps))


def load_and_train(case: Case, folder: str, steps: int) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """A new model and optimizer from the checkpoint; their state, and the training that goes on from it."""
    ep, optimizer = start(case)
    with torch.no_grad():
        for parameter in ep.model.parameters():
            parameter.add_(1.0)  # what is loaded must not have been there
    ep.home = ep.home[:, ::-1].copy()  # another placement than a new run has
    ep.load_checkpoint(Path(folder) / "step", optimizer)
    return logical_state(ep, optimizer), train_steps(case, ep, optimizer, range(steps, case.steps))


def read_without_the_library(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint by torch alone."""
    reader = dcp.FileSystemReader(folder)
    known = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(md.size, dtype=md.properties.dtype) for name, md in known.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant
        dcp.load(state, storage_reader=reader, no_dist=True)
    return {name: value.numpy() for name, value in state.items()}


def overwrite(folder: str) -> None:
    ep, optimizer = start(Case())
    ep.save_checkpoint(Path(folder) / "step", optimizer)


def trouble_on_rank_1(folder: str) -> list[str]:
    """Why saving and loading are refused where one rank has state that cannot be saved, or sees no checkpoint."""
    ep, optimizer = start(Case())
    second = dist.get_rank() == 1
    state = optimizer.state[ep.expert_parameters()[0]]
    state.update({"history": []} if second else {})
    return refusals(
        lambda: ep.save_checkpoint(Path(folder) / "new", optimizer),
        lambda: ep.load_checkpoint(Path(folder) / ("elsewhere" if second else "step")),
    )


def refused_by_the_file_system(folder: str) -> list[str]:
    """Why a checkpoint cannot be saved below a file, and not be loaded where one rank's index is torn."""
    ep, optimizer = start(Case())
    second = dist.get_rank() == 1
    ep.save_checkpoint(Path(folder) / "good", optimizer)
    new = torch.optim.AdamW(ep.model.parameters())
    messages = refusals(
        lambda: ep.save_checkpoint(Path(folder) / "file" / "new", optimizer),
        lambda: ep.load_checkpoint(Path(folder) / ("torn" if second else "good")),
        lambda: ep.load_checkpoint(Path(folder) / "good", new),  # was saved without optimizer state
    )
    return [*messages, f"{len(new.state)} states"]


def refusals(*attempts: Callable[[], None]) -> list[str]:
    """What each of them was refused with."""
    messages = []
    for attempt in attempts:
        try:
            attempt()
        except ReLibraError as error:
            messages.append(str(error))
    return messages
