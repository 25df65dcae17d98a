"""`relibra convert`: every form from files, what it prints, and how it refuses."""

import base64
import io
import json

import numpy as np
import pytest

from relibra_kernels.cli import main
from relibra_kernels.planner import RoutingTrace

E, L, K = 16, 3, 2
LENGTHS = (5, 3, 7)


@pytest.fixture
def routing():
    random = np.random.default_rng(0)
    ids = [random.random((n - 1, L, E)).argsort(-1)[..., :K].astype(np.uint8) for n in LENGTHS]
    for sequence in ids:
        sequence[:, 0] = 0  # a dense layer
    return ids


def convert(source, out, form, *arguments):
    return main(["convert", str(source), "--from", form, "--num-experts", str(E), "--out", str(out), *arguments])


MINE = """
import numpy as np
from relibra_kernels.planner.formats.sequences import trace_of_sequences

def backwards(records, num_experts, **options):
    return trace_of_sequences([np.asarray(ids)[::-1] for ids in records], num_experts, last_token="left out", **options)
"""


def test_a_loader_of_ones_own(routing, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    source = save_folder(tmp_path / "arrays", [ids[::-1] for ids in routing])
    assert convert(source, tmp_path / "trace.npz", f"{tmp_path / 'mine.py'}:backwards") == 0
    trace = RoutingTrace.load(tmp_path / "trace.npz")
    for i, ids in enumerate(routing):
        np.testing.assert_array_equal(trace.sequence(i)[:-1], ids[:, 1:])
    for form, message in (
        (f"{tmp_path / 'mine.py'}:forwards", "has no such function, only trace_of_sequences, backwards"),
        (f"{tmp_path / 'none.py'}:backwards", "is no Python file"),
        ("SGLand", "did you mean sglang?"),
    ):
        assert convert(source, tmp_path / "other.npz", form) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other.npz").exists()


def save_folder(folder, arrays):
    folder.mkdir()
    for name, array in zip(("b", "c", "d"), arrays, strict=True):
        np.save(folder / f"{name}.npy", array)
    (folder / "a.txt").write_text("not an array")
    return folder


def save_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def b64(data):
    return base64.b64encode(data).decode()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return b64(file.getvalue())


def with_last(routing, fill):
    return [np.concatenate([ids.astype(np.int16), np.full((1, L, K), fill, np.int16)]) for ids in routing]


def write_verl(routing, path):
    rows, mask = np.zeros((3, 8, L, K), np.int16), np.zeros((3, 8), np.int64)
    for i, ids in enumerate(routing):
        rows[i, 1 : len(ids) + 1], mask[i, 1 : len(ids) + 2] = ids, 1
    np.savez(path, routed_experts=rows, attention_mask=mask)
    return path


def write_megatron(routing, path):
    lines = [
        {
            "step": i,
            "layer": layer,
            "rank": 0,
            "num_tokens": len(ids),
            "topk": K,
            "top_indices": ids[:, layer].tolist(),
        }
        for i, ids in enumerate(routing)
        for layer in (1, 2)
    ]
    return save_lines(path, lines)


WRITERS = {  # form -> (how the routing is written, more arguments)
    "vllm": (lambda r, path: save_folder(path / "folder", r), ()),
    "vllm lines": (lambda r, path: save_lines(path / "in", [{"routed_experts": npy(ids)} for ids in r]), ()),
    "vllm responses": (
        lambda r, path: save_lines(
            path / "in",
            [
                {
                    "prompt_token_ids": [1, 2],
                    "choices": [{"token_ids": [0] * (len(ids) - 1), "routed_experts": npy(ids)}],
                }
                for ids in r
            ],
        ),
        (),
    ),
    "sglang": (
        lambda r, path: save_lines(
            path / "in", [{"meta_info": {"routed_experts": b64(ids.astype("<i4").tobytes())}} for ids in r]
        ),
        ("--num-layers", "3", "--top-k", "2"),
    ),
    "verl": (lambda r, path: write_verl(r, path / "in.npz"), ()),
    "slime": (lambda r, path: save_folder(path / "folder", [ids.astype(np.int32) for ids in r]), ()),
    "prime-rl": (
        lambda r, path: save_lines(
            path / "in",
            [
                {
                    "routed_experts": {
                        "data": b64(ids.astype(np.uint8).tobytes()),
                        "shape": ids.shape,
                        "dtype": "uint8",
                    }
                }
                for ids in with_last(r, 0)
            ],
        ),
        (),
    ),
    "nemo-rl": (
        lambda r, path: save_lines(
            path / "in",
            [{"routed_experts": f"nrlre1:int16:{len(ids)}x{L}x{K}:{b64(ids.tobytes())}"} for ids in with_last(r, -1)],
        ),
        (),
    ),
    "megatron": (lambda r, path: write_megatron(r, path / "in"), ()),
}


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_becomes_the_same_trace(form, routing, tmp_path, capsys):
    write, arguments = WRITERS[form]
    source = write(routing, tmp_path)
    assert convert(source, tmp_path / "trace.npz", form.split()[0], "--json", *arguments) == 0
    with np.load(tmp_path / "trace.npz") as file:
        assert {"expert_ids", "unknown", "offsets", "num_experts", "moe_layer_ids"} <= set(file.files)
        assert file["expert_ids"].dtype == np.int8 and file["offsets"].dtype == np.int64
    trace = RoutingTrace.load(tmp_path / "trace.npz")
    assert trace.moe_layer_ids == (1, 2) and trace.num_experts == E
    last = 0 if form == "megatron" else 1  # its routers saw every token
    assert np.diff(trace.offsets).tolist() == [n - 1 + last for n in LENGTHS]
    for index, ids in enumerate(routing):
        np.testing.assert_array_equal(trace.sequence(index)[: len(ids)], ids[:, 1:])
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert (report["sequences"], report["tokens"], report["unknown_tokens"]) == (3, trace.num_tokens, 3 * last)
    assert "MoE layers: 1, 2\n" in out


def test_statistics_become_loads_that_can_be_planned(tmp_path):
    counts = np.random.default_rng(0).integers(1, 99, (L, E))
    counts[0] = 0
    (tmp_path / "in.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    assert convert(tmp_path / "in.json", tmp_path / "loads.npz", "sglang-statistics") == 0
    with np.load(tmp_path / "loads.npz") as file:
        np.testing.assert_array_equal(file["loads"], counts[1:, None])
    cluster = ["--nodes", "1", "--gpus-per-node", "4", "--replica-slots", "2"]
    assert main(["plan", str(tmp_path / "loads.npz"), *cluster, "--out", str(tmp_path / "plan.npz")]) == 0


def test_token_ids_are_checked(routing, tmp_path, capsys):
    folder = save_folder(tmp_path / "folder", routing)
    tokens = save_lines(tmp_path / "tokens.jsonl", [list(range(n)) for n in LENGTHS])
    assert convert(folder, tmp_path / "trace.npz", "vllm", "--tokens", str(tokens)) == 0
    tokens = save_lines(tmp_path / "tokens.jsonl", [list(range(n + 1)) for n in LENGTHS])
    (tmp_path / "trace.npz").unlink()
    assert convert(folder, tmp_path / "trace.npz", "vllm", "--tokens", str(tokens)) == 2
    assert "folder: routed_experts of sequence 0 has 4 rows, but its 6 tokens need 5" in capsys.readouterr().err
    assert not (tmp_path / "trace.npz").exists()
    save_lines(tmp_path / "tokens.jsonl", [["a"]])
    assert convert(folder, tmp_path / "trace.npz", "vllm", "--tokens", str(tokens)) == 2
    assert "no list of token ids" in capsys.readouterr().err


def test_token_ids_of_a_response_are_checked(routing, tmp_path, capsys):
    line = {"prompt_token_ids": [1, 2], "choices": [{"token_ids": [3], "routed_experts": npy(routing[0])}]}
    assert convert(save_lines(tmp_path / "in", [line]), tmp_path / "trace.npz", "vllm") == 2
    assert "sequence 0 has 4 rows, but its 3 tokens need 2" in capsys.readouterr().err


def sglang_answer(ids, prompt, **beside):
    """An OpenAI-compatible response of SGLang: routing is beside the choices, of the first of them."""
    usage = {"prompt_tokens": prompt, "completion_tokens": len(ids) + 1 - prompt}
    routing = b64(ids.astype("<i4").tobytes())
    return {"choices": [{"index": 0}], "usage": usage, "sglext": {"routed_experts": routing, **beside}}


def test_openai_compatible_responses_of_sglang(routing, tmp_path, capsys):
    out, sizes = tmp_path / "trace.npz", ("--num-layers", "3", "--top-k", "2")
    lines = [sglang_answer(ids, 2) for ids in routing]
    assert convert(save_lines(tmp_path / "in", lines), out, "sglang", *sizes) == 0
    assert "assumed" not in capsys.readouterr().out  # the usage says how long they are
    trace = RoutingTrace.load(out)
    for index, ids in enumerate(routing):
        np.testing.assert_array_equal(trace.sequence(index)[:-1], ids[:, 1:])
    suffix = {**lines[2], "sglext": sglang_answer(routing[2][3:], 2)["sglext"]}  # but 7 tokens by its usage
    assert convert(save_lines(tmp_path / "in", [suffix]), out, "sglang", *sizes, "--holes", "unknown") == 2
    assert "has 3 rows from token 0 on, but says that it has 7 tokens" in capsys.readouterr().err
    shorter = sglang_answer(routing[0], 2, input_ids=[1, 2], output_ids=[[3, 4], [5]])
    assert convert(save_lines(tmp_path / "in", [shorter]), out, "sglang", *sizes) == 2
    assert "4 rows" in (error := capsys.readouterr().err) and "4 tokens" in error
    two = {**lines[0], "choices": [{"index": 0}, {"index": 1}]}  # no routing of the second
    assert convert(save_lines(tmp_path / "in", [two]), out, "sglang", *sizes) == 2
    assert "line 1 has no 'routed_experts'" in capsys.readouterr().err


def test_aborted_requests_of_sglang(routing, tmp_path, capsys):
    whole = {"meta_info": {"routed_experts": b64(routing[0].astype("<i4").tobytes())}}
    aborted = {"meta_info": {"prompt_tokens": 3, "completion_tokens": 0, "finish_reason": {"type": "abort"}}}
    source = save_lines(tmp_path / "in", [whole, aborted])
    sizes = ("--num-layers", "3", "--top-k", "2")
    assert convert(source, tmp_path / "trace.npz", "sglang", *sizes) == 2
    assert "sequence 1 has no routing" in capsys.readouterr().err
    assert convert(source, tmp_path / "trace.npz", "sglang", *sizes, "--holes", "unknown") == 0
    assert np.diff(RoutingTrace.load(tmp_path / "trace.npz").offsets).tolist() == [5, 3]


def test_holes_and_layers_can_be_named(routing, tmp_path, capsys):
    routing[2][1] = 0
    folder = save_folder(tmp_path / "folder", routing)
    assert convert(folder, tmp_path / "trace.npz", "vllm") == 2
    assert "--holes unknown" in capsys.readouterr().err
    assert convert(folder, tmp_path / "trace.npz", "vllm", "--holes", "unknown", "--moe-layers", "2") == 0
    trace = RoutingTrace.load(tmp_path / "trace.npz")
    assert trace.unknown.sum() == 4 and trace.moe_layer_ids == (2,)


def bad_inputs(routing, path):
    """(form, input, more arguments, what the message must say)"""
    folder = save_folder(path / "folder", routing)
    (path / "empty").mkdir()
    yield "vllm", path / "nowhere", (), "nowhere"
    yield "vllm", path / "empty", (), r"no .npy file"
    (path / "text").write_text("text\n")
    yield "vllm", path / "text", (), "line 1 is not JSON"
    yield "sglang-statistics", path / "text", (), "JSON"
    yield "verl", path / "text", (), "text"
    yield "vllm", save_lines(path / "a", [{"other": 1}]), (), "no 'routed_experts'"
    yield "vllm", save_lines(path / "b", [[1]]), (), "line 1 is no object"
    yield "vllm", save_lines(path / "c", [{"routed_experts": [1]}]), (), "must be integers [tokens, layers, k]"
    yield "sglang", save_lines(path / "d", [{"routed_experts": "AAAA"}]), (), "--num-layers"
    yield "vllm", folder, ("--num-layers", "3"), "--num-layers"
    yield "vllm", folder, ("--num-experts", "4"), "sequence 0 names expert"
    yield "vllm", folder, ("--num-experts", "0"), "--num-experts is 0"
    yield "vllm", folder, ("--moe-layers", "7"), "3 layers were recorded"
    yield "vllm", folder, ("--out", str(path / "no" / "trace.npz")), "--out is"
    yield "megatron", path / "text", ("--moe-layers", "1"), "--moe-layers"
    np.save(folder / "e.npy", np.array([{}], object), allow_pickle=True)
    yield "vllm", folder, (), "e.npy"
    (folder / "e.npy").write_bytes((folder / "d.npy").read_bytes()[:-5])
    yield "vllm", folder, (), "e.npy"


def test_bad_input_is_one_line_and_status_2(routing, tmp_path, capsys):
    for form, source, arguments, message in bad_inputs(routing, tmp_path):
        assert convert(source, tmp_path / "trace.npz", form, *arguments) == 2, message
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, (message, error)
        assert not (tmp_path / "trace.npz").exists()


def test_unknown_engines_are_refused(tmp_path, capsys):
    assert convert(tmp_path, tmp_path / "trace.npz", "tgi") == 2
    assert "--from is 'tgi', but must be one of " in capsys.readouterr().err
