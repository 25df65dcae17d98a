"""Optimizer state that is sharded within experts, over the ranks that hold copies of them: 2 by 2 processes."""

from dataclasses import replace

import numpy as np
import pytest
from ep_checkpoints import read_without_the_library
from ep_sharded import refused_to_save, train_and_move
from toy_training import Case, train_alone
from training_checks import worst_error

CASE = Case(ranks=4, plan="shuffled", steps=3, micro_batches=1, hidden=15, intermediate=13)


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize(("dim", "intermediate"), [(1, 13), (2, 13), (2, 1)])
def test_moves_with_its_expert(ranks, tmp_path, dim, intermediate):
    """Training with migrations is training in one process; moving and saving change no bit of the logical state."""
    case = replace(CASE, intermediate=intermediate)
    results = ranks(4).run(train_and_move, case, dim, str(tmp_path))
    parameters = train_alone(case)[2]
    down = [result["shapes"][1][dim] for result in results]
    size = case.hidden if dim == 1 else intermediate
    assert sorted(down) == [size // 2] * 2 + [size // 2 + 1] * 2  # uneven parts, and empty ones
    for result in results:
        assert result["moved"] > 0 and result["changed"] > 0
        trained = result["trained"]
        assert worst_error({name: trained[name] for name in parameters}, parameters) <= 1e-12
        assert_same(result["after moving"], trained)
        assert_same(result["loaded"], trained)
    read = read_without_the_library(tmp_path / "step")
    for name, value in results[0]["trained"].items():
        key = f"model.{name}" if name in parameters else f"optimizer.{name}"
        np.testing.assert_array_equal(read[key], value, err_msg=name)


def test_state_sharded_over_experts_is_not_saved(ranks, tmp_path):
    for message in ranks(4).run(refused_to_save, CASE, str(tmp_path)):
        assert "optimizer state 'exp_avg' of moe.0.experts.gate_up_proj is sharded over its experts" in message
    assert not (tmp_path / "step").exists()
