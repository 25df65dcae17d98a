"""What a clock would time: every part of a layer, launched on real tensors with a config of its kind."""

import sys

import pytest
import torch

from relibra_kernels.configs.config import GEMM_KERNELS, BlockConfig, GemmConfig
from relibra_kernels.form import GPT_OSS, ExpertForm
from relibra_kernels.tuning.catalogue import PARTS
from relibra_kernels.tuning.measured_inputs import RotatingWorkload
from relibra_kernels.tuning.models import Model
from relibra_kernels.tuning.search_goal import goals

MODELS = [Model("plain", 32, 16, 4, 2, ExpertForm()), Model("gpt-oss", 48, 32, 4, 2, GPT_OSS)]


@pytest.fixture
def grids(monkeypatch):
    """The grids of what is launched, and it is."""
    found = []

    def counted(launch):
        return lambda kernel, grid, *args, **options: (found.append(grid), launch(kernel, grid, *args, **options))

    for name, module in list(sys.modules.items()):
        if name.startswith("relibra_kernels.kernels.") and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", counted(module.launch))
    return found


@pytest.mark.parametrize("kernel", PARTS)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_every_part_of_a_layer_is_launched(model, kernel, grids):
    if kernel in GEMM_KERNELS:
        config = GemmConfig(16, 16, 16, 4, 1)
    else:
        config = BlockConfig(32, 1, 4 if kernel == "grad_bias" else 1)
    found = [goal for goal in goals(model, [6], kernels=[kernel]) if goal.slots <= 2]
    assert {goal.part for goal in found} == set(PARTS[kernel] if kernel != "grad_bias" or model.form.has_bias else ())
    for goal in found:
        for rows in goal.groups:
            workload = RotatingWorkload(goal, rows, torch.device("cpu"), 0)
            grids.clear()
            workload.call(config)()
            assert grids, goal.part
            if kernel == "permute":  # a program a token
                assert grids == [(goal.rows_per_slot,)]
            workload.restore()
