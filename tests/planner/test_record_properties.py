"""Properties of all loaders: what an engine wrote comes back, and damaged input is an error of the library."""

import collections
import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from records import ENGINES, PARTS, b64, envelope, in_parts, in_place, load, npy, padded, payload, random_ids

from relibra_kernels.cli import build_parser, convert
from relibra_kernels.planner import (
    ReLibraError,
    RoutingTrace,
    from_megatron,
    from_megatron_lines,
    from_nemo_rl,
    from_prime_rl,
    from_sglang,
    from_vllm,
    loads_from_sglang,
)
from relibra_kernels.planner.formats.reading import read_json

SMALL = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
WIDTHS = (np.uint8, np.uint16, np.int16, np.int32, np.int64)


@st.composite
def batches(draw):
    """(routing [N - 1, L, K] a sequence with a dense prefix, first MoE layer, experts)"""
    experts = draw(st.sampled_from([4, 64, 129, 256, 300]))
    top_k = draw(st.integers(2, min(4, experts)))
    layers, dense = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4).filter(lambda n: max(n) > 1))
    dtype = draw(st.sampled_from([d for d in WIDTHS if np.iinfo(d).max >= experts - 1]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    routing = [random_ids(rng, n - 1, layers + dense, top_k, experts).astype(dtype) for n in lengths]
    for ids in routing:
        ids[:, :dense] = 0
    return routing, dense, experts


@SMALL
@given(batches(), st.sampled_from(ENGINES), st.data())
def test_what_an_engine_wrote_comes_back_or_names_the_token(batch, engine, data):
    routing, dense, experts = batch
    lengths = [len(ids) + 1 for ids in routing]
    layers = range(dense, routing[0].shape[1])
    trace = load(engine, routing, experts, num_tokens=lengths, moe_layer_ids=layers)
    expected = RoutingTrace(
        np.concatenate([in_place(ids[:, dense:].astype(np.int64), -1) for ids in routing]),
        np.cumsum([0, *lengths]),
        experts,
        layers,
    )
    np.testing.assert_array_equal(trace.expert_ids, expected.expert_ids)
    np.testing.assert_array_equal(trace.reasons, expected.reasons)
    assert trace.moe_layer_ids == expected.moe_layer_ids and trace.offsets.tolist() == expected.offsets.tolist()
    if engine == "vllm as lists" and max(lengths) == 1:
        return
    sequence = int(np.argmax(lengths))
    token = data.draw(st.integers(0, lengths[sequence] - 2))
    layer = data.draw(st.integers(dense, routing[0].shape[1] - 1))
    spoiled = [ids.copy() for ids in routing]
    spoiled[sequence][token, layer] = spoiled[sequence][token, layer].min() or 1  # the largest number is no routing
    with pytest.raises(ReLibraError, match=rf"sequence {sequence} of token {token}, layer {layer} are"):
        load(engine, spoiled, experts, num_tokens=lengths, moe_layer_ids=layers)


@SMALL
@given(batches(), st.sampled_from(PARTS), st.data())
def test_parts_with_starts_make_the_whole(batch, engine, data):
    routing, dense, experts = batch
    ids = max(routing, key=len)
    cuts, end = [], 0
    while end < len(ids):
        start = data.draw(st.integers(0, end))
        stop = data.draw(st.integers(max(start, end if start == end else start), len(ids)))
        if stop == len(ids) or data.draw(st.booleans()):
            cuts.append((start, ids[start:stop]))
            end = stop
        else:
            break
    if end < len(ids):
        cuts.append((end, ids[end:]))
    trace = in_parts(engine, cuts, experts, num_tokens=[len(ids) + 1], moe_layer_ids=range(dense, ids.shape[1]))
    np.testing.assert_array_equal(trace.expert_ids[:-1], ids[:, dense:])


@SMALL
@given(batches(), st.sampled_from(ENGINES), st.data())
def test_holes_are_unknown_or_named(batch, engine, data):
    """Some layers of some tokens were not recorded, whatever stands there: zeros, -1, the largest number."""
    routing, dense, experts = batch
    lengths, layers = [len(ids) + 1 for ids in routing], range(dense, routing[0].shape[1])
    dtype, top_k = np.iinfo(routing[0].dtype), routing[0].shape[2]
    counts_up = (np.concatenate(routing) == np.arange(top_k)).all((1, 2)).any()
    assume(engine != "nemo-rl" or not counts_up)  # its filler
    values = [0] if dtype.min == 0 else [0, -1]
    if dtype.min == 0 and dtype.max >= experts and engine not in ("vllm as lists", "sglang", "sglang response"):
        values.append(dtype.max)
    tokens = st.tuples(*(st.sets(st.integers(0, max(0, n - 2)), max_size=2 if n > 1 else 0) for n in lengths))
    holes = data.draw(tokens.filter(any))
    for ids, of_sequence in zip(routing, holes, strict=True):
        for token in of_sequence:
            missing = data.draw(st.sets(st.sampled_from(layers), min_size=1))
            ids[token, sorted(missing)] = data.draw(st.sampled_from(values))
    trace = load(engine, routing, experts, num_tokens=lengths, moe_layer_ids=layers, holes="unknown")
    for index, (ids, of_sequence) in enumerate(zip(routing, holes, strict=True)):
        expected = in_place(ids[:, dense:].astype(np.int64), -1)
        expected[sorted(of_sequence)] = -1
        np.testing.assert_array_equal(trace.sequence(index), expected)
    first = next(index for index, of_sequence in enumerate(holes) if of_sequence)
    count, token = len(holes[first]), min(holes[first])
    said = f"sequence {first} has no routing for {count} tokens, the first is token {token} in layers"
    with pytest.raises(ReLibraError, match=said):
        load(engine, routing, experts, num_tokens=lengths, moe_layer_ids=layers)


@SMALL
@given(batches(), st.data())
def test_megatron_gives_the_same_trace(batch, data):
    """Routers and lines of a trace, with the routers of layers that predict later tokens between them."""
    routing, _, experts = batch
    routing = [ids for ids in routing if len(ids)]
    layers, top_k = routing[0].shape[1:]
    for ids in routing:  # without dense layers, which have no router
        ids[:] = random_ids(np.random.default_rng(len(ids)), len(ids), layers, top_k, experts)
    numbers = sorted(data.draw(st.sets(st.integers(0, 40), min_size=layers, max_size=layers)))
    whole, lengths = np.concatenate(routing), [len(ids) for ids in routing]
    of_routers = from_megatron(list(whole.swapaxes(0, 1)), experts, sequence_lengths=lengths, moe_layer_ids=numbers)
    lines = [
        {"step": step, "rank": 0, "layer": number, "num_tokens": len(ids), "topk": top_k, "block": "decoder",
         "top_indices": ids[:, layer].tolist()}
        for step, ids in enumerate(routing) for layer, number in enumerate(numbers)
    ]  # fmt: skip
    mtp = {**lines[0], "block": "mtp", "mtp_idx": 0}
    of_lines = from_megatron_lines(data.draw(st.permutations([mtp, *lines])), experts)
    for trace in (of_routers, of_lines):
        np.testing.assert_array_equal(trace.expert_ids, whole)
        assert trace.moe_layer_ids == tuple(numbers)
        assert np.diff(trace.offsets).tolist() == lengths


E, L, K = 8, 2, 2


def written(form, folder):
    """(bytes of a good file of this form, where the command line reads it, more arguments)"""
    routing = [random_ids(np.random.default_rng(n), n - 1, L, K, E).astype(np.uint8) for n in (4, 6)]
    whole = [in_place(ids, 0) for ids in routing]
    path, arguments = folder / "in", []

    def lines(values):
        return "".join(json.dumps(value) + "\n" for value in values).encode()

    match form:
        case "vllm":
            data = lines({"routed_experts": npy(ids), "tokens": [1] * (len(ids) + 1)} for ids in routing)
        case "sglang":
            spans = [{"version": "7", "start": 0, "end": 1}, {"version": "8", "start": 1, "end": 2}]
            beside = {"routed_experts_start_len": 0, "completion_tokens": 2, "weight_versions": spans}
            words = (
                {"routed_experts": b64(ids.astype("<i4")), "prompt_tokens": len(ids) - 1, **beside} for ids in routing
            )
            data, arguments = lines({"meta_info": word} for word in words), ["--num-layers", L, "--top-k", K]
        case "sglang-statistics":
            data = json.dumps({"logical_count": [[3, 1, 4, 1, 5, 9, 2, 6]]}).encode()
        case "prime-rl":
            data = lines({"routed_experts": payload(ids, 0)} for ids in whole)
        case "nemo-rl":
            data = lines({"routed_experts": envelope(ids)} for ids in whole)
        case "megatron":
            keys = {"step": 0, "rank": 0, "num_tokens": 3, "topk": K}
            data = lines({**keys, "layer": i, "top_indices": routing[0][:, i].tolist()} for i in range(L))
        case "slime":
            path = folder / "samples"
            path.mkdir(exist_ok=True)
            file = io.BytesIO()
            np.save(file, routing[1])
            return file.getvalue(), path, path / "a.npy", []
        case "verl":
            rows, mask = padded(whole)
            file = io.BytesIO()
            np.savez(file, routed_experts=rows, attention_mask=mask)
            data = file.getvalue()
        case "trace":
            RoutingTrace(np.concatenate(routing), [0, 3, 8], E, range(L)).save(folder / "good.npz")
            data = (folder / "good.npz").read_bytes()
    return data, path, path, arguments


def mutated(data, rng):
    """Bytes flipped, cut, inserted, or digits and brackets changed for others."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, len(out))) if out else 0
        match rng.integers(0, 5):
            case 0:
                out[at : at + 1] = bytes([rng.integers(0, 256)])
            case 1:
                del out[at:]
            case 2:
                out[at:at] = rng.bytes(int(rng.integers(1, 9)))
            case 3:
                del out[at : at + int(rng.integers(1, 40))]
            case 4:
                out[at : at + 1] = bytes([rng.choice(list(b'0129-.[]{}:,"nu'))])
    return bytes(out)


def read(args):
    """What the command does, but for the file that it writes."""
    if args.form == "sglang-statistics":
        loads_from_sglang(read_json(args.input), args.num_experts)
    else:
        collections.deque(convert._traces(args), maxlen=0)


FORMS = ("vllm", "sglang", "sglang-statistics", "prime-rl", "nemo-rl", "megatron", "slime", "verl", "trace")


@pytest.mark.parametrize("form", FORMS)
def test_mutated_files_are_read_or_refused(form, tmp_path):
    """1,000 a form. Anything but a ReLibraError, which the command line turns into status 2, fails the test."""
    data, given_path, file, arguments = written(form, tmp_path)
    rng, refused = np.random.default_rng(17), 0
    command = ["convert", given_path, "--from", form, "--num-experts", E, "--out", tmp_path / "out.npz", *arguments]
    if form != "trace":
        args = build_parser("convert").parse_args([str(x) for x in command])
    for number in range(1000):
        file.write_bytes(mutated(data, rng))
        try:
            if form == "trace":
                RoutingTrace.load(file)
            else:
                args.holes = ("refuse", "unknown")[number % 2]
                read(args)
        except ReLibraError:
            refused += 1
    assert refused > 600


RETYPED = (None, True, 3.5, -1, "text", b"bytes", [], {}, [None], [[]], [[[]]], [[[0.5]]], {"data": 1}, 1 << 70)


@pytest.mark.parametrize("value", RETYPED, ids=[repr(v)[:12] for v in RETYPED])
def test_retyped_arguments_are_refused(value):
    ids = random_ids(np.random.default_rng(0), 3, L, K, E).astype(np.uint8)
    calls = [
        lambda: from_vllm([value], E, num_tokens=[4]),
        lambda: from_vllm([ids], value),
        lambda: from_vllm([ids], E, num_tokens=[value]),
        lambda: from_vllm([ids], E, starts=[value], num_tokens=[9]),
        lambda: from_sglang([value], E, num_layers=L, top_k=K, num_tokens=[4]),
        lambda: from_sglang([b64(ids)], E, num_layers=value, top_k=K),
        lambda: from_prime_rl([{**payload(ids), "shape": value}], E),
        lambda: from_prime_rl([{**payload(ids), "dtype": value}], E),
        lambda: from_prime_rl([{**payload(ids), "data": value}], E),
        lambda: from_prime_rl([{**payload(ids), "start": value}], E, num_tokens=[9]),
        lambda: from_nemo_rl([value], E, num_tokens=[4]),
        lambda: RoutingTrace(ids, [0, 3], value, range(L)),
        lambda: RoutingTrace(ids, [0, 3], E, value),
        lambda: loads_from_sglang(value, E),
        lambda: loads_from_sglang({"logical_count": value}, E),
    ]
    for number, call in enumerate(calls):
        with contextlib.suppress(ReLibraError):
            call()
            assert number in (3, 9) or (number, value) in ((2, 3.5), (2, True)), (number, value)


@pytest.mark.parametrize("key", ["expert_ids", "offsets", "num_experts", "moe_layer_ids", "unknown"])
def test_retyped_arrays_of_a_trace_are_refused(key, tmp_path):
    ids = random_ids(np.random.default_rng(0), 4, L, K, E).astype(np.int8)
    good = {"expert_ids": ids, "offsets": np.array([0, 4]), "num_experts": np.array(E), "moe_layer_ids": np.arange(L),
            "unknown": np.zeros(4, np.uint8)}  # fmt: skip
    np.savez(tmp_path / "t.npz", **good)
    assert RoutingTrace.load(tmp_path / "t.npz").num_tokens == 4
    wrong = ("text", 1.5, np.zeros((0, 3)), np.full(3, -7), np.array([["a"]]), np.array(1 << 60), np.zeros(4, bool))
    for value in wrong:
        np.savez(tmp_path / "t.npz", **{**good, key: value})
        if key == "unknown" and np.asarray(value).dtype.kind == "b":
            continue
        for share in ({}, {"sequences": [0]}, {"layers": [0]}):
            with pytest.raises(ReLibraError, match=r"t\.npz"):
                RoutingTrace.load(tmp_path / "t.npz", **share)
