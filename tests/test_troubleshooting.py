"""Every message that the page of troubleshooting lists is one that is given: provoked here, or found in the source.

A message that a test can bring about in one process is brought about. The others need ranks, a GPU or another program:
the test that brings them about is named. The words of all stand in a source.
"""

import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="most of the messages are about transformers models")
import transformers
from hf_families import experts_modules, make_model, make_tokens

import relibra_kernels.integrations.transformers as relibra
from relibra_kernels import ops
from relibra_kernels.integrations import megatron
from relibra_kernels.integrations.transformers import expert_parallel
from relibra_kernels.planner import from_vllm

ROOT = Path(__file__).parents[1]
EXPERTS = 64


def rows(count, layers=2, choices=2):
    random = np.random.default_rng(0)
    return random.random((count, layers, EXPERTS)).argsort(-1)[..., :choices].astype(np.uint8)


def holes():
    ids = rows(9)
    ids[[2, 4, 5]] = 0
    from_vllm([ids], EXPERTS)


def changed(row, layer, choice, expert):
    ids = rows(5)
    ids[row, layer, choice] = expert
    from_vllm([ids], EXPERTS)


def twice():
    ids = rows(5)
    ids[1, 1] = 7
    from_vllm([ids], EXPERTS)


def one_choice():
    ids = rows(5, choices=1)
    ids[:, 0] = 0
    from_vllm([ids], EXPERTS)


def recorded(model, tokens):
    with torch.no_grad(), relibra.record_routing(model) as record:
        model(tokens)
    return record.trace(tokens.tolist())


def replayed(fed, changes=None, **options):
    """What was recorded, replayed while something else is fed."""
    model, tokens = make_model("qwen3_moe"), make_tokens(2, 9)
    trace = recorded(model, tokens)
    with relibra.replay(model, trace, token_ids=None if changes is None else tokens.tolist(), **options):
        model(fed(tokens))


def other_model():
    trace = recorded(make_model("qwen3_moe"), make_tokens(2, 9))
    with relibra.replay(make_model("mixtral"), trace):
        pass


def other_token(tokens):
    tokens = tokens.clone()
    tokens[0, 3] = 3 + (tokens[0, 3] - 2) % 20
    return tokens


def with_experts(**attributes):
    experts = experts_modules(make_model("qwen3_moe"))[0]
    for name, value in attributes.items():
        setattr(experts, name, value)
    relibra.expert_form(experts)


NOT_IMPORTED = """
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=1, vocab_size=8)).set_experts_implementation("relibra")
"""


def not_imported():
    done = subprocess.run([sys.executable, "-c", NOT_IMPORTED], capture_output=True, text=True, timeout=300)
    raise RuntimeError(done.stderr)


def by_sorting():
    model, tokens = make_model("qwen3_moe"), make_tokens(2, 9)
    trace = recorded(model, tokens)
    router = model.model.layers[0].mlp.gate

    def forward(x):
        logits = x.reshape(-1, x.shape[-1]) @ router.weight.T
        weights, indices = logits.softmax(-1).sort(descending=True)
        return logits, weights[:, : trace.top_k], indices[:, : trace.top_k]

    router.forward = forward
    with relibra.replay(model, trace):
        model(tokens)


def shared_tokens():
    experts = experts_modules(make_model("qwen3_moe"))[0]
    mesh = {size: SimpleNamespace(size=lambda size=size: size, get_group=lambda: None) for size in (1, 2)}
    expert_parallel.RelibraEP(experts, mesh[1], mesh[2])


def vllm_that_ended():
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ended").touch()
        (Path(folder) / "vllm.log").write_text("out of memory")
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT / "examples")
            vllm_files = importlib.import_module("vllm_files")
            vllm_files.VllmEngine(Path(folder), 0, None)._wait_for(Path(folder) / "done")


def triton_on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELIBRA_BACKEND", "triton")
        patch.delenv("TRITON_INTERPRET", raising=False)
        ops.backend(torch.device("cpu"))


PROVOKED = {
    "has 5 rows, but its 7 tokens need 6": lambda: from_vllm([rows(5)], EXPERTS, num_tokens=[7]),
    "has no routing for 3 tokens": holes,
    "names expert 64, but there are 64 experts": lambda: changed(1, 0, 0, EXPERTS),
    "an expert is chosen twice": twice,
    "zeros only in layer 0": one_choice,
    "trace has (layers, top-k, experts)": other_model,
    'Specified `experts_implementation="relibra"` is not supported': not_imported,
    "has_gate of ... is False": lambda: with_experts(has_gate=False),
    "_apply_gate of ...": lambda: with_experts(act_fn=torch.nn.Tanh()),
    "without experts that transformers or we compute": lambda: relibra.layers(torch.nn.Linear(2, 2)),
    "the forward was fed token 17 at [0, 3]": lambda: replayed(other_token, changes=True),
    "the forward was fed rows of [10] tokens without padding": lambda: replayed(lambda tokens: tokens[:, :-1]),
    "moe_router_fusion is True": lambda: megatron.check_config(SimpleNamespace(moe_router_fusion=True)),
    "does not choose 8 of 64 experts with torch.topk": by_sorting,
    "tp_size is 2": shared_tokens,
    "the vLLM process ended": vllm_that_ended,
    "RELIBRA_BACKEND is 'triton' and the tensors are on the CPU": triton_on_the_cpu,
}


RANKS_NEEDED = {  # messages that need ranks, a GPU or Megatron: the test that brings each about, and what it expects
    "transformers shards experts by id": ("integrations/test_hf_expert_parallel.py", "shards experts by id"),
    "targets are for 4 routers, but this stage has 2": (
        "integrations/test_megatron.py",
        "targets are for 1 routers, but this stage has 2",
    ),
    "the GPU has compute capability 7.5": (
        "test_compile_only.py",
        r"compute capability 7\.5; it must be 8\.0 or newer",
    ),
}
THEIRS = {"requires `accelerate`"}  # of transformers, which every environment here has with accelerate


def messages():
    """The messages in the first cells of the page's tables."""
    found = []
    for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| message"):
            cell = line[2:].split(" | ")[0]
            found += [next(filter(None, ways)).strip() for ways in re.findall(r"^``(.+?)``|`([^`]+)`", cell)]
    return [message for message in found if not message.startswith(("TRITON_INTERPRET", "set_experts"))]


def words(message):
    """What a message says whatever its numbers are, as a pattern."""
    parts = re.split(r"\d+(?:\.\d+)?%?|\.\.\.", message)
    return ".*".join(re.escape(part) for part in parts)


def test_there_are_messages():
    assert len(messages()) >= 20
    assert {*PROVOKED, *RANKS_NEEDED, *THEIRS} == set(messages()), {*PROVOKED, *RANKS_NEEDED, *THEIRS} ^ set(messages())


@pytest.mark.parametrize("message", PROVOKED)
def test_what_is_listed_is_what_is_said(message):
    with pytest.raises(Exception, match=f"(?s){words(message)}"):
        PROVOKED[message]()


@pytest.mark.parametrize("message", RANKS_NEEDED)
def test_what_needs_ranks_is_brought_about_by_the_test_that_is_named(message):
    path, expected = RANKS_NEEDED[message]
    assert expected in (ROOT / "tests" / "relibra_kernels" / path).read_text()


@pytest.mark.parametrize("message", [message for message in messages() if message not in PROVOKED])
def test_other_messages_stand_in_the_source(message):
    folders = [ROOT / "relibra_kernels", ROOT / "planner", ROOT / "examples"]
    ours = "\n".join(path.read_text() for folder in folders for path in sorted(folder.rglob("*.py")))
    theirs = (Path(transformers.__file__).parent / "modeling_utils.py").read_text()
    source = re.sub(r'"\s+f?"', "", ours) + theirs  # texts that are broken over lines
    source = re.sub(r"\{[^{}]*\}", "...", source)
    longest = max(re.split(r"\d+(?:\.\d+)?%?|\.\.\.|[`']", message), key=len).strip()
    assert len(longest) >= 10 and longest in source, longest
