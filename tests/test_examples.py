"""The examples, short.

The RL example: the reward rises, replay is exact, the plan balances; and what it saves. The training loop: its command
line, copies of the experts, and a run that goes on from a checkpoint.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import Ranks
from train_example import example_losses

pytest.importorskip("transformers", reason="the examples train a transformers model")

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_grpo_doubles_its_reward(tmp_path):
    pytest.importorskip("matplotlib", reason="the example draws curves")
    command = [
        sys.executable,
        str(EXAMPLES / "grpo_qwen3_moe.py"),
        "--seeds",
        "0",
        "--steps",
        "35",
        "--out",
        str(tmp_path),
    ]
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


def test_the_training_loop_goes_on_from_a_checkpoint(tmp_path):
    """Four ranks that hold all experts twice: interrupted and resumed, the losses are those of one run."""
    ranks = Ranks(4)
    try:
        whole = ranks.run(example_losses, ["--copies", "2", "--steps", "3"])
        assert all(losses == whole[0] for losses in whole) and len(whole[0]) == 3
        saving = ["--copies", "2", "--checkpoints", str(tmp_path)]
        first = ranks.run(example_losses, [*saving, "--steps", "1"])
        then = ranks.run(example_losses, [*saving, "--steps", "3"])
    finally:
        ranks.close()
    assert first[0] == whole[0][:1]
    assert then[0] == pytest.approx(whole[0][1:], rel=1e-5)  # planned from another placement
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_the_training_loop_runs_from_the_command_line():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(EXAMPLES / "train_ep.py"), "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "step 0: loss " in done.stdout and '"planned_max_mean"' in done.stdout
