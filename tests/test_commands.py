"""Every command that a page shows runs here, is a step of a gate, or is listed with the reason why it cannot."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import page_commands
import pytest
from page_commands import ELSEWHERE, FENCE, LONG, ROOT, STEPS

from relibra_kernels.cli import main
from relibra_kernels.planner import generate_loads, generate_trace

SEQUENCES, TOKENS, LAYERS, EXPERTS, TOP_K = 256, 12, 2, 128, 4


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the commands name, as a reader has them by then."""
    monkeypatch.chdir(tmp_path)
    trace = generate_trace(LAYERS, SEQUENCES, EXPERTS, TOP_K, TOKENS)
    (tmp_path / "demo-output").mkdir()
    for name in ("trace.npz", "TRACE.npz", "mine.npz", "demo-output/trace.npz"):
        trace.save(name)
    Path("FILE").write_bytes(Path("trace.npz").read_bytes())
    np.savez("INPUT.npz", loads=generate_loads(LAYERS, 4, EXPERTS, TOP_K, 64 * 100))
    ids = trace.expert_ids.reshape(SEQUENCES, TOKENS, LAYERS, TOP_K)
    np.savez(
        "batch.npz", routed_experts=np.maximum(ids, 0).astype(np.int16), attention_mask=np.ones(ids.shape[:2], int)
    )
    (tmp_path / "IN").mkdir()
    for number, sequence in enumerate(ids):
        np.save(tmp_path / "IN" / f"{number:03}.npy", sequence[:-1].astype(np.uint8))
    (tmp_path / "FOLDER").mkdir()
    sizes = {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128}
    config = {"model_type": "qwen3_moe", "moe_intermediate_size": 32, "architectures": ["Qwen3MoeForCausalLM"], **sizes}
    (tmp_path / "FOLDER" / "config.json").write_text(json.dumps(config))
    blocks = {info.strip(): code for info, code in FENCE.findall((ROOT / "CONTRIBUTING.md").read_text())}
    policy = blocks["python my_policy.py"]
    Path("my_policy.py").write_text(policy)
    Path("my_file.py").write_text(policy.replace("def dealt", "def my_policy"))
    Path("my_loader.py").write_text(blocks["python my_loader.py"])
    Path("records.jsonl").write_text(json.dumps({"routed_experts": [0, 3, 5, 1, 2, 0, 4, 7]}) + "\n")
    Path("RUN.jsonl").write_text("")
    return tmp_path


@pytest.mark.parametrize("line", page_commands.to_run(os.environ.get("RELIBRA_COMMANDS") == "all"))
def test_a_command_runs(line, folder):
    if "transformers" in line or "train_ep" in line or "FOLDER" in line:
        pytest.importorskip("transformers", reason="the command is about transformers models")
    program, *words = shlex.split(line)
    if program == "relibra":
        try:
            assert main([*words, "--once"] if words[0] == "watch" else words) == 0
        except SystemExit as ended:
            assert ended.code == 0
        return
    modules = {"pytest": ["-m", "pytest", "-q"], "torchrun": ["-m", "torch.distributed.run"], "python": []}
    words = [str(ROOT / word) if re.match(r"(?:bench|examples)/", word) else word for word in words]
    command = [sys.executable, *modules[program], *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_command_that_is_not_run_here_is_a_step_or_says_why():
    """Each name below is one that a page still shows, and each step is in the gate that is named."""
    shown = page_commands.commands()
    assert len(shown) > 70 and STEPS.keys() | LONG <= shown.keys(), (STEPS.keys() | LONG) - shown.keys()
    assert all(any(line.startswith(begin) for line in shown) for begin in ELSEWHERE)
    makefile = (ROOT / "Makefile").read_text()
    gate = (ROOT / ".ci" / "run").read_text()
    nightly = makefile.split("\nnightly:")[1].split("\n\n")[0]
    for line, where in STEPS.items():
        if where not in ("ci", "nightly"):
            assert (ROOT / where).is_file(), line
        elif line.startswith("make "):
            target = line.split()[1]
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
            step = rf"\bmake {target}\b" if where == "ci" else rf"\$\(MAKE\) {target}(?:-in-time)?(?: .*)?$"
            assert re.search(step, gate if where == "ci" else nightly, re.MULTILINE), (line, where)
    assert "RELIBRA_COMMANDS=all" in nightly and "bash .ci/run" in nightly


def test_targets_that_pages_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    for line in page_commands.commands():
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE), line


@pytest.mark.skipif(os.environ.get("RELIBRA_COMMANDS") != "all", reason="make nightly runs it, after make demo")
def test_the_readmes_table_is_what_the_demo_prints():
    """Its rows without times, which do not vary, against what `make demo` has left."""
    summary = json.loads((ROOT / "demo-output" / "summary.json").read_text())
    names = ("static", "planned", "balanced")
    rows = {
        "max/mean over ranks, mean": [f"{summary[f'{name}_max_mean']:.3f}" for name in names],
        "max/mean over ranks, worst": [f"{summary[f'{name}_max_mean_worst']:.3f}" for name in names],
        "replicas a layer and micro-batch": [f"{summary[f'{name}_replicas']:.2f}" for name in names],
        "experts moved a step": [f"{summary[f'{name}_experts_moved']:.1f}" for name in names],
        "MB moved a step: tokens": [f"{summary[f'{name}_token_bytes_per_step'] / 1e6:.1f}" for name in names],
        "  replicas and their gradients": [f"{summary[f'{name}_replica_bytes_per_step'] / 1e6:.1f}" for name in names],
    }
    for label, cells in rows.items():
        assert re.search(rf"^{label} +{' +'.join(cells)}$", (ROOT / "README.md").read_text(), re.MULTILINE), label
