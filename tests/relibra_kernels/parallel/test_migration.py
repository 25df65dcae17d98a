"""Rows of one layer that move in place, and which tensors are an expert's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import one_rank
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from relibra_kernels.parallel.comm.collectives import Comm
from relibra_kernels.parallel.experts.migration import expert_tensors, move_experts
from relibra_kernels.planner import InputError

CPU = torch.device("cpu")


class Mailbox:
    """The exchanges of several ranks that are run one after the other: every rank sends, then every rank receives."""

    def __init__(self, size: int):
        self.size, self.sent, self.receiving = size, {}, False

    def rank(self, rank: int) -> Comm:
        comm = Comm.__new__(Comm)
        comm.rank, comm.size = rank, self.size

        def exchange(send, send_counts, receive_counts, kind, phase, into=None):
            self.sent[rank, phase] = torch.split(send, send_counts)
            if not self.receiving:
                raise StopIteration
            received = [self.sent[source, phase][rank] for source in range(self.size)]
            assert [len(part) for part in received] == receive_counts
            return torch.cat(received)

        comm.exchange = exchange
        comm.all_reduce = lambda *_: None
        return comm


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_experts_are_where_the_new_home_says(size, per_rank, seed):
    """One tensor a rank, whose rows name their expert; before a rank has everything, nothing has changed."""
    random = np.random.default_rng(seed)
    old, new = (random.permutation(np.arange(size * per_rank) % size) for _ in range(2))
    tensors = [torch.from_numpy(np.flatnonzero(old == rank)).float()[:, None].repeat(1, 3) for rank in range(size)]
    before = [tensor.clone() for tensor in tensors]
    mailbox = Mailbox(size)
    for rank, tensor in enumerate(tensors):  # what is sent is sent before anything is overwritten
        if not np.array_equal(old, new):
            with pytest.raises(StopIteration):
                move_experts(mailbox.rank(rank), {"weight": tensor}, old, new, "layer 0", CPU)
        assert torch.equal(tensor, before[rank])
    mailbox.sent = {key: tuple(part.clone() for part in parts) for key, parts in mailbox.sent.items()}
    mailbox.receiving = True
    for rank, tensor in enumerate(tensors):
        move_experts(mailbox.rank(rank), {"weight": tensor}, old, new, "layer 0", CPU)
        assert tensor[:, 0].tolist() == np.flatnonzero(new == rank).tolist()


def test_sharded_state_moves_by_its_local_rows():
    """State sharded within experts moves as this rank's part of each; sharded over experts it cannot."""
    parameter = torch.nn.Parameter(torch.zeros(2, 4, 3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with one_rank():
        mesh = init_device_mesh("cpu", (1,))
        whole = torch.arange(24.0).view(2, 4, 3)
        optimizer.state[parameter] = {"momentum": distribute_tensor(whole, mesh, [Shard(1)]), "step": 3, "none": None}
        tensors = expert_tensors(parameter, "weight", optimizer)
        assert list(tensors) == ["weight", "weight.momentum"]
        tensors["weight.momentum"][0].zero_()
        assert not optimizer.state[parameter]["momentum"].full_tensor()[0].any()
        optimizer.state[parameter] = {"momentum": distribute_tensor(whole, mesh, [Replicate()])}
        assert "weight.momentum" in expert_tensors(parameter, "weight", optimizer)
        optimizer.state[parameter] = {"momentum": distribute_tensor(whole, mesh, [Shard(0)])}
        with pytest.raises(InputError, match=r"weight.momentum is sharded over its experts"):
            expert_tensors(parameter, "weight", optimizer)


def test_state_that_is_offloaded_travels_on_the_device_of_the_experts():
    """Here that of the experts is the meta device, which holds no values, and the state is on the CPU."""
    seen = []

    def exchange(send, send_counts, receive_counts, kind, phase):
        seen.append((phase, send.device.type, send_counts, receive_counts))
        return torch.full((sum(receive_counts), 3), 7.0)  # from the other rank

    comm = SimpleNamespace(rank=0, size=2, exchange=exchange, all_reduce=lambda *_: None)
    moment = torch.arange(6.0).view(2, 3)
    old, new = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    move_experts(comm, {"weight.exp_avg": moment}, old, new, "layer 3", torch.device("meta"))
    assert seen == [("layer 3, moving weight.exp_avg", "meta", [0, 1], [0, 1])]
    assert moment.tolist() == [[0, 1, 2], [7, 7, 7]]


class Quantised(torch.Tensor):
    """As an 8-bit optimizer keeps a moment: it has the parameter's shape, and rows that it does not give."""


def of_blocks() -> dict[str, torch.Tensor]:
    """A moment in 8 bits, of the parameter's shape, and the scales of its blocks."""
    return {"absmax1": torch.zeros(2), "state1": torch.zeros(2, 4, 3, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"exp_avg": torch.zeros(2, 4, 3).as_subclass(Quantised)},
            r"weight.exp_avg is a Quantised: it must be a plain",
        ),
        (of_blocks(), r"optimizer state 'absmax1' of weight has shape \(2,\): it must be a single number or have"),
    ],
    ids=["a tensor of its own kind", "scales of blocks"],
)
def test_state_of_8_bit_optimizers_is_refused(state, message):
    """By what gathers the tensors of every layer, before any of them moves."""
    parameter = torch.nn.Parameter(torch.zeros(2, 4, 3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = state
    with pytest.raises(InputError, match=message):
        expert_tensors(parameter, "weight", optimizer)


def test_the_master_moves_with_its_state():
    parameter = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    parameter.main_param = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.AdamW([parameter.main_param])
    parameter.main_param.grad = torch.ones(2, 3)
    optimizer.step()
    names = ["main_param", "main_param.exp_avg", "main_param.exp_avg_sq", "main_param.grad"]
    assert sorted(expert_tensors(parameter, "w", optimizer)) == ["w", *(f"w.{name}" for name in names)]
