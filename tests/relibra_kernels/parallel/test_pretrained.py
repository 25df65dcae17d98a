"""Hugging Face's checkpoint folders: every rank reads its own experts alone, and what is written is the whole model."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from ep_pretrained import known_model, load_move_and_save, refusals, saved_like_another
from hf_families import make_model, make_tokens


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss", "nemotron_h"])
def test_a_folder_is_loaded_in_shares_and_written_whole(ranks, tmp_path, family):
    model = known_model(family)
    source, target, fused = tmp_path / "source", tmp_path / "target", tmp_path / "fused"
    model.save_pretrained(source, max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    with torch.no_grad():
        expected = model(make_tokens(2, 7)).logits
    for result in ranks(2).run(load_move_and_save, family, str(source), str(target), str(fused)):
        assert result["moved"] > 0
        assert result["dense"] + result["own"] <= result["read"] < 1.02 * (result["dense"] + result["own"])
        torch.testing.assert_close(result["logits"], expected, rtol=1e-5, atol=1e-5)
        assert "save_pretrained(ep, folder), which all ranks call" in result["refused"][0]
        assert "exists already" in result["refused"][1]
    keys = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"].keys()
    assert json.loads((target / "model.safetensors.index.json").read_text())["weight_map"].keys() == keys
    for folder in (target, fused):
        again = type(model).from_pretrained(folder, dtype=model.dtype)
        assert not list(folder.parent.glob("*.partial"))
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name


def test_folders_that_do_not_fit_are_refused(ranks, tmp_path):
    model = make_model("qwen3_moe")
    whole, folders = tmp_path / "whole", tmp_path / "folders"
    model.save_pretrained(whole)
    names = ("a empty", "b torn", "c of another model", "d no such file")
    for name in names:
        shutil.copytree(whole, folders / name)
    (folders / names[0] / "model.safetensors").unlink()
    (folders / names[1] / "model.safetensors").write_bytes(b"x" * 100)
    shutil.rmtree(folders / names[2])
    make_model("deepseek_v3").save_pretrained(folders / names[2])
    (folders / names[3] / "model.safetensors").unlink()
    (folders / names[3] / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "gone"}}')
    for errors in ranks(2).run(refusals, "qwen3_moe", str(folders), str(whole)):
        empty, torn, other, gone, buffer = errors
        assert "has neither model.safetensors.index.json nor model.safetensors" in empty
        assert torn.startswith("FormatError") and "cannot be read" in torn
        assert other.startswith("FormatError") and "(64, 32); the model's is (32, 32)" in other
        assert gone.startswith("FormatError") and "lacks model.embed_tokens.weight" in gone
        assert buffer.startswith("InputError: buffer table is on the meta device")


def test_a_folder_that_names_other_tensors_is_no_pattern(ranks, tmp_path):
    """deepseek_v3 is wider in attention; gpt_oss has other names."""
    make_model("gpt_oss").save_pretrained(tmp_path / "like")
    for error in ranks(2).run(saved_like_another, str(tmp_path / "like"), str(tmp_path / "out")):
        assert error.startswith("FormatError: like is ") and "has no name for model.layers.0.self_attn" in error
