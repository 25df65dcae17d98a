"""`relibra doctor --model`: what works for a model, told from its config alone."""

import json

import pytest

pytest.importorskip("transformers", reason="needs transformers")
import torch
import transformers
from hf_all_families import FAMILIES, families_table, tiny_config, tiny_model
from versions import TRANSFORMERS

from relibra_kernels.cli import doctor_model, main
from relibra_kernels.configs import lookup


def about(folder, capsys):
    main(["doctor", "--json", "--model", str(folder)])
    return [entry for entry in json.loads(capsys.readouterr().out) if entry["topic"] == "Model"]


def test_a_family_that_works(tmp_path, capsys):
    tiny_model("deepseek_v3").config.save_pretrained(tmp_path)
    found = about(tmp_path, capsys)
    assert {entry["level"] for entry in found} == {"ok"}
    text = "\n".join(entry["text"] for entry in found)
    assert (
        "1 MoE layers (1..1), top 2 of 8 experts" in text
        and "ours compute its experts, silu-gated, without biases" in text
    )
    assert about(tmp_path / "config.json", capsys) == found  # the file itself


ANSWERS = {  # of the table in docs/huggingface.md, under a plan -> what doctor says
    "yes": "ExpertParallel: the model is taken over where it is",
    "yes, text alone": "ExpertParallel: the model is taken over where it is",
    "with every token recorded: it looks both ways": "ExpertParallel: with every token recorded",
    "no: its router may skip the experts, which a plan has no place for": "no ExpertParallel: its router chooses of",
}


@pytest.mark.skipif(TRANSFORMERS < (5, 23), reason="the table is of transformers 5.23")
def test_every_family_is_said_to_work_as_the_table_has_it():
    said = families_table()
    for family, (name, _) in FAMILIES.items():
        with torch.device("meta"):
            config = tiny_model(family).config
        config.architectures = [name]
        answer = next(text for _, text, _ in doctor_model.examine_config(config) if "ExpertParallel: " in text)
        under_a_plan = said[family][3]
        expected = ANSWERS.get(under_a_plan, "no ExpertParallel: has_post_expert_norm of")
        assert answer.startswith(expected), family


@pytest.mark.skipif(TRANSFORMERS < (5, 23), reason="the table is of transformers 5.23")
def test_a_family_without_the_interface_is_named():
    outside = {
        family for family, (kernels, *_) in families_table().items() if "do not use transformers' experts" in kernels
    }
    assert outside == {*doctor_model.NO_INTERFACE}
    for family in outside:
        kind = transformers.CONFIG_MAPPING[family.replace("nllb_moe", "nllb-moe")]
        (found,) = doctor_model.examine_config(kind())
        assert found[0] == "problem" and "do not use transformers' experts interface" in found[1], family


@pytest.mark.parametrize("family", ["aria", "glm4v_moe", "mistral4", "qwen3_vl_moe"])
def test_a_model_that_sees_images_is_examined_whole(family, tmp_path, capsys):
    """Of the config of its folder, which is of text and images."""
    tiny_config(transformers.CONFIG_MAPPING[family]).save_pretrained(tmp_path)
    found = about(tmp_path, capsys)
    assert "problem" not in {entry["level"] for entry in found}
    assert any(entry["text"].startswith("ExpertParallel: the model") for entry in found)


def test_which_configs_it_gets_and_what_a_plan_takes(tmp_path, capsys):
    """The figures are those of `estimate_plan` for the model's own sizes; every GPU with shipped configs is named."""
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
    config = transformers.Qwen3MoeConfig(num_hidden_layers=2, vocab_size=64, **sizes)
    config.save_pretrained(tmp_path)
    lookup.forget()  # what was asked for another model's sake
    texts = [entry["text"] for entry in about(tmp_path, capsys)]
    configs = [text for text in texts if text.startswith("configs on ")]
    assert len(configs) == 6 and all("gate_up: shipped" in text and "grad_weight: shipped" in text for text in configs)
    (plan,) = (text for text in texts if text.startswith("a plan of 8 GPUs"))
    home = 2 * 16 * 3 * 2048 * 768  # parameters of a rank's experts in two layers
    assert f"home weights {2 * home / 1e9:.2f}, gradient {4 * home / 1e9:.2f}, kept " in plan


def test_experts_without_a_gate_are_priced_by_two_projections(tmp_path, capsys):
    """Of the width that the experts work in, which is not the model's."""
    blocks = ["full_attention", "moe", "full_attention", "moe"]
    sizes = {"moe_intermediate_size": 1856, "moe_latent_size": 1024, "n_routed_experts": 128, "num_experts_per_tok": 6}
    config = transformers.NemotronHConfig(layers_block_type=blocks, hidden_size=2688, vocab_size=64, **sizes)
    config.save_pretrained(tmp_path)
    texts = [entry["text"] for entry in about(tmp_path, capsys)]
    assert "kernels: ours compute its experts, relu2 without a gate, without biases" in texts
    (plan,) = (text for text in texts if text.startswith("a plan of 8 GPUs"))
    home = 2 * 16 * 2 * 1024 * 1856  # parameters of a rank's experts in two layers
    assert f"home weights {2 * home / 1e9:.2f}, gradient {4 * home / 1e9:.2f}, kept " in plan


@pytest.mark.parametrize(("family", "message"), [("Llama", "without experts that transformers or we compute")])
def test_what_does_not_work_is_named(family, message, tmp_path, capsys):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4}
    getattr(transformers, f"{family}Config")(**sizes).save_pretrained(tmp_path)
    assert any(message in entry["text"] for entry in about(tmp_path, capsys) if entry["level"] == "problem")


def test_a_folder_without_a_config(tmp_path, capsys):
    (entry,) = about(tmp_path, capsys)
    assert entry["level"] == "problem" and str(tmp_path) in entry["text"]
