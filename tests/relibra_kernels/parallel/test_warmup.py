"""All ranks use the configs that the first one found, also for sizes that nobody asked for yet."""

import pytest

pytest.importorskip("triton", reason="needs triton")

from warmed import CONFIGS, answers_before_and_after


def test_the_first_rank_decides(ranks, tmp_path):
    answers = ranks(2).run(answers_before_and_after, str(tmp_path))
    assert [before for before, _ in answers] == [(config, config) for config in CONFIGS]
    assert [after for _, after in answers] == [(CONFIGS[0], CONFIGS[0])] * 2
