"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run_in_order(monkeypatch, tmp_path):
    pytest.importorskip("transformers", reason="the README's model is a transformers one")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {"__name__": "readme"}
    try:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)
        before = [p.detach().clone() for p in namespace["model"].parameters()]
        assert namespace["ep"].layers[0].experts.gate_up_proj.grad.abs().sum() > 0
        namespace["optimizer"].step()
        assert any((b != p).any() for b, p in zip(before, namespace["model"].parameters(), strict=True))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
