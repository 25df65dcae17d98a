"""Send and combine buffers: made when a micro-batch opens, exactly as large as its largest layer needs."""

import pytest
import torch
from ep_buffers import buffers_of_batch, views_of_forwards
from ranks import one_rank
from toy_training import Case

from relibra_kernels.parallel import RuntimeOptions
from relibra_kernels.parallel.tokens.buffers import Buffers, Shape

LENGTHS = (5, 9, 3, 7, 16, 24, 18, 25)  # later micro-batches are larger
CASES = {
    "float64": Case(),
    "bf16": Case(dtype=torch.bfloat16, layers=3),
    "own rows stay": Case(ranks=3, gpus_per_node=3, experts=9, options=RuntimeOptions(overlap=True)),
    "rows fetched again": Case(dtype=torch.float32, options=RuntimeOptions(redispatch=True)),
    "frozen experts": Case(frozen=("gate_up_proj", "down_proj")),
    "two hops": Case(ranks=4, dtype=torch.bfloat16, options=RuntimeOptions(transport="two", redispatch=True)),
    "two hops, own node first": Case(ranks=4, options=RuntimeOptions(transport="two", overlap=True)),
    "sums in fp32": Case(dtype=torch.bfloat16, options=RuntimeOptions(combine_dtype=torch.float32)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_layers_allocate_none(ranks, case):
    case = Case(**{**vars(case), "plan": "shuffled", "sequence_lengths": LENGTHS})
    for found, reserved, taken in ranks(case.ranks).run(buffers_of_batch, case):
        assert found == [True] * 2 * case.micro_batches
        assert reserved == taken


@pytest.mark.parametrize("live", [False, True])
def test_views_of_other_rows_are_let_go_of(live):
    """Every forward has another number of tokens, so that none takes the views of an earlier one."""
    with one_rank():
        counts = views_of_forwards(live)
    assert len(counts) > 3 and 0 < max(counts) <= 4  # sent, received, combined, and their gradients


def test_a_buffer_grows_and_changes_its_dtype():
    buffers, device = Buffers(), torch.device("cpu")
    buffers.reserve({"rows": 24}, device)
    memory = buffers.memory["rows", device]
    small = buffers.take("rows", device, Shape(1, 0, 1, 3, torch.float32))
    assert [len(part) for part in small] == [1, 1, 1, 1] and small.here.data_ptr() == memory.data_ptr()
    assert buffers.take("rows", device, Shape(0, 0, 0, 5, torch.float64)).here.shape == (0, 5)
    assert buffers.take("rows", device, Shape(1, 1, 1, 4, torch.bfloat16)).come.data_ptr() == memory.data_ptr()
    assert buffers.memory["rows", device] is memory
    large = buffers.take("rows", device, Shape(2, 3, 4, 3, torch.float32))
    assert len(buffers.memory["rows", device]) == 9 * 3 * 4
    large.come.fill_(1)
    large.sent.fill_(2)
    large.leave.fill_(3)
    assert large.here[:, 0].tolist() == [1, 1, 2, 2, 2] and large.sent[:, 0].tolist() == [2, 2, 2, 3, 3, 3, 3]
    again = buffers.take("rows", device, Shape(1, 0, 1, 3, torch.float32))
    assert again.here.data_ptr() == large.here.data_ptr() != small.here.data_ptr()
