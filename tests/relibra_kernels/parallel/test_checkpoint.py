"""A checkpoint depends neither on the placement nor on the number of ranks, and is there whole or not at all."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ep_checkpoints import (
    load_and_train,
    overwrite,
    read_without_the_library,
    refused_by_the_file_system,
    train_and_save,
    trouble_on_rank_1,
)
from ranks import RankError
from toy_training import Case

from relibra_kernels.parallel import RuntimeOptions
from relibra_kernels.planner import FormatError

STEPS = 2
SAVED = Case(  # on two nodes with two hops; two ranks and one are on one node, and have one hop
    ranks=4,
    gpus_per_node=2,
    plan="shuffled",
    dtype=torch.float32,
    steps=3,
    micro_batches=1,
    options=RuntimeOptions(transport="two"),
)


@pytest.fixture(scope="module")
def checkpoint(ranks, tmp_path_factory):
    """(its folder, the state that was saved, the results of the steps after it)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    results = ranks(4).run(train_and_save, SAVED, str(folder), STEPS)
    return folder, results[0][0], [after for _, after in results]


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("size", [4, 2, 1])
def test_goes_on_with_the_same_bits(ranks, checkpoint, size):
    folder, saved, after = checkpoint
    case = replace(SAVED, ranks=size, gpus_per_node=min(size, 2))
    for rank, (loaded, result) in enumerate(ranks(size).run(load_and_train, case, str(folder), STEPS)):
        assert_same(loaded, saved)
        np.testing.assert_allclose(result["losses"], after[0]["losses"], rtol=1e-5)
        if size == SAVED.ranks:  # an uninterrupted run to the bit, although the placement was another
            assert_same(result["parameters"], after[rank]["parameters"])


def test_torch_alone_reads_it(checkpoint):
    folder, saved, _ = checkpoint
    read = read_without_the_library(folder / "step")
    for name, value in saved.items():
        np.testing.assert_array_equal(np.broadcast_to(read[name], value.shape), value, err_msg=name)
    assert not (folder / "step.partial").exists()


def test_never_overwrites(ranks, checkpoint):
    with pytest.raises(RankError, match="exists already"):
        ranks(2).run(overwrite, str(checkpoint[0]))


def test_refuses_what_is_none(ranks, tmp_path):
    with pytest.raises(RankError, match="is no checkpoint") as error:
        ranks(2).run(load_and_train, replace(SAVED, ranks=2), str(tmp_path), STEPS)
    assert error.value.kind == FormatError.__name__


def test_refuses_another_model(ranks, checkpoint):
    with pytest.raises(RankError, match=r"lacks model.moe.2.experts.gate_up_proj and \d+ more"):
        ranks(2).run(load_and_train, replace(SAVED, ranks=2, layers=3), str(checkpoint[0]), STEPS)


def test_what_one_rank_refuses_stops_all(ranks, checkpoint):
    first, second = ranks(2).run(trouble_on_rank_1, str(checkpoint[0]))
    assert "rank 1 stopped saving" in first[0] and "rank 1 stopped loading" in first[1]
    assert "'history' of moe.0.experts.gate_up_proj is a list" in second[0] and "is no checkpoint" in second[1]
    assert not (checkpoint[0] / "new").exists()


def test_what_the_file_system_refuses_stops_all(ranks, tmp_path):
    """A file where the first rank would make a folder; an index that was torn on one rank."""
    (tmp_path / "file").write_text("")
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / ".metadata").write_bytes(b"no pickle")
    first, second = ranks(2).run(refused_by_the_file_system, str(tmp_path))
    assert "clearing" in first[0] and "failed" in first[0] and "rank 0 stopped clearing" in second[0]
    assert "rank 1 stopped loading" in first[1]
    assert "torn cannot be read" in second[1]
    assert "good lacks optimizer." in first[2] and first[3] == second[3] == "0 states"  # nothing changed
