"""The RL example, short: the reward rises, replay is exact, the plan balances; and what it saves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the example trains a transformers model")
pytest.importorskip("matplotlib", reason="the example draws curves")

EXAMPLE = Path(__file__).parents[1] / "examples" / "grpo_qwen3_moe.py"


def test_grpo_doubles_its_reward(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--seeds", "0", "--steps", "35", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "grpo.json").read_text())
    assert (tmp_path / "grpo.png").read_bytes().startswith(b"\x89PNG")
    figures = results["seeds"]["0"]
    assert len(results["steps"]["0"]) == 35
    assert figures["improvement"] >= 2 and figures["first_reward"] < 0.15
    assert figures["largest_log_prob_gap"] <= 1e-4
    assert figures["max_mean_planned"] < figures["max_mean_static"] and figures["max_mean_planned"] <= 1.02
    assert sum(step["replicas"] for step in results["steps"]["0"]) > 0
    assert f"{figures['improvement']:.1f}x" in done.stdout
