"""Several expert-parallel groups, FSDP2, DDP, gradient accumulation and clipping: still training in one process."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ep_composed import train_composed
from toy_training import Case, train_alone
from training_checks import worst_error

from relibra_kernels.parallel import RuntimeOptions

CASE = Case(ranks=4, experts=8, steps=3, sequence_lengths=(9, 14, 6, 11) * 4, micro_batches=2)
MAX_NORM = 0.5


@pytest.fixture(scope="module")
def alone():
    """Losses, norms before clipping, and parameters of one process."""
    return train_alone(CASE, max_norm=MAX_NORM)


@pytest.mark.parametrize(
    ("groups", "dense"), [(1, "ours"), (2, "ours"), (1, "fsdp"), (2, "fsdp"), (1, "ddp"), (2, "ddp"), (4, "ours")]
)
def test_is_training_alone(ranks, alone, groups, dense):
    losses, gradients, parameters = alone
    norms = [float(np.sqrt(sum((g**2).sum() for g in step.values()))) for step in gradients]
    assert max(norms) > MAX_NORM  # or clipping would not be tested
    results = ranks(4).run(train_composed, CASE, groups, dense, MAX_NORM)
    if groups < 4:
        assert results[0]["moved"] > 0 and results[0]["replicas"] > 0
    for result in results:
        np.testing.assert_array_equal(result["home"], results[0]["home"])
        np.testing.assert_allclose(result["losses"], losses, rtol=1e-12)
        np.testing.assert_allclose(result["norms"], norms, rtol=1e-6)
        assert worst_error(result["parameters"], parameters) <= 1e-12


def test_two_groups_of_two_nodes_with_two_hops(ranks):
    """Each group has rails and nodes of its own."""
    case = replace(CASE, ranks=8, options=RuntimeOptions(transport="two"))
    losses, _, parameters = train_alone(case, max_norm=MAX_NORM)
    for result in ranks(8).run(train_composed, case, 2, "ours", MAX_NORM):
        np.testing.assert_allclose(result["losses"], losses, rtol=1e-12)
        assert worst_error(result["parameters"], parameters) <= 1e-12


def test_torch_clips_the_same():
    """The scale that our clipping applies is torch's."""
    from relibra_kernels.parallel.experts.gradients import clip

    parameters = [torch.nn.Parameter(torch.zeros(5)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.arange(5.0)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    clip(parameters, norm.double(), 1.0)
    expected = torch.arange(5.0) / (norm + 1e-6)
    torch.testing.assert_close(parameters[0].grad, expected)
