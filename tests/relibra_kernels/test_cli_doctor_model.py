"""`relibra doctor --model`: what works for a model, told from its config alone."""

import json

import pytest

pytest.importorskip("transformers", reason="needs transformers")
import transformers
from hf_all_families import tiny_model

from relibra_kernels.cli import main


def about(folder, capsys):
    main(["doctor", "--json", "--model", str(folder)])
    return [entry for entry in json.loads(capsys.readouterr().out) if entry["topic"] == "Model"]


def test_a_family_that_works(tmp_path, capsys):
    tiny_model("deepseek_v3").config.save_pretrained(tmp_path)
    found = about(tmp_path, capsys)
    assert {entry["level"] for entry in found} == {"ok"}
    text = "\n".join(entry["text"] for entry in found)
    assert "1 MoE layers (1..1), top 2 of 8 experts" in text and "activation='silu'" in text


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("Llama", "without experts that transformers or we compute"),
        ("NemotronH", "has_gate of NemotronHExperts is False"),
    ],
)
def test_what_does_not_work_is_named(family, message, tmp_path, capsys):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4}
    getattr(transformers, f"{family}Config")(**sizes).save_pretrained(tmp_path)
    assert any(message in entry["text"] for entry in about(tmp_path, capsys) if entry["level"] == "problem")


def test_a_folder_without_a_config(tmp_path, capsys):
    (entry,) = about(tmp_path, capsys)
    assert entry["level"] == "problem" and str(tmp_path) in entry["text"]
