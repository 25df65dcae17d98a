"""Recorded routing of every engine, built by hand in its documented layout, and the quirks of each."""

import base64
import io

import numpy as np
import pytest

from relibra_kernels.planner import (
    FormatError,
    InputError,
    RoutingTrace,
    ShapeError,
    count_loads,
    from_megatron,
    from_megatron_lines,
    from_nemo_rl,
    from_prime_rl,
    from_sglang,
    from_slime,
    from_verl,
    from_vllm,
    loads_from_sglang,
)

E, L, K = 16, 3, 2  # layer 0 is dense: engines record every hidden layer
LENGTHS = (4, 6, 1)  # tokens of each sequence, prompt and completion
TOKEN_IDS = [list(range(100, 100 + n)) for n in LENGTHS]


@pytest.fixture
def routing():
    """int64 [N - 1, L, K] a sequence: what the model did, layer 0 zeros."""
    random = np.random.default_rng(0)
    ids = [random.random((n - 1, L, E)).argsort(-1)[..., :K] for n in LENGTHS]
    for sequence in ids:
        sequence[:, 0] = 0
    return ids


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def in_place(routing, fill):
    """[N, L, K] a sequence, with a row of `fill` for the last token."""
    return [np.concatenate([ids, np.full((1, *ids.shape[1:]), fill)]) for ids in routing]


def padded(routing, fill=0):
    """verl's [bs, j, L, K] and attention mask: prompts are padded left, answers right."""
    rows, mask = np.full((len(routing), 9, L, K), fill, np.int16), np.zeros((len(routing), 9), np.int64)
    for i, ids in enumerate(in_place(routing, 0)):
        rows[i, i : i + len(ids)], mask[i, i : i + len(ids)] = ids, 1
    return rows, mask


def check(trace: RoutingTrace, routing, last_known=False):
    assert trace.offsets.tolist() == [0, 4, 10, 11]
    assert trace.moe_layer_ids == (1, 2) and trace.num_experts == E
    assert trace.expert_ids.dtype == np.int8
    for index, ids in enumerate(routing):
        np.testing.assert_array_equal(trace.sequence(index)[:-1], ids[:, 1:])
    assert trace.only_last_tokens_unknown
    assert np.flatnonzero(trace.unknown).tolist() == ([] if last_known else [3, 9, 10])


LOADERS = {
    "vllm": lambda r, **o: from_vllm([ids.astype(np.uint8) for ids in r], E, **o),
    "vllm, older": lambda r, **o: from_vllm([ids.astype(np.int16) for ids in r], E, **o),
    "vllm over HTTP": lambda r, **o: from_vllm([npy(ids.astype(np.uint8)) for ids in r], E, **o),
    "vllm, prompts apart": lambda r, **o: from_vllm(
        [ids[2:].astype(np.int16) for ids in r],
        E,
        prompt_routed_experts=[ids[:2].astype(np.int16) for ids in r],
        **o,
    ),
    "sglang": lambda r, **o: from_sglang(
        [base64.b64encode(ids.astype("<i4").tobytes()).decode() for ids in r], E, num_layers=L, top_k=K, **o
    ),
    "verl, jagged": lambda r, **o: from_verl([ids.astype(np.int16) for ids in in_place(r, 0)], E, **o),
    "verl, padded": lambda r, **o: from_verl(padded(r)[0], E, attention_mask=padded(r)[1], **o),
    "verl, packed": lambda r, **o: from_verl(
        np.concatenate([*in_place(r, 0), np.zeros((5, L, K), int)])[None].astype(np.int16),
        E,
        cu_seqlens=np.cumsum([0, *LENGTHS]),
        **o,
    ),
    "slime": lambda r, **o: from_slime([ids.astype(np.int32) for ids in r], E, **o),
    "prime-rl": lambda r, **o: from_prime_rl(
        [
            {"data": ids.astype(np.uint8).tobytes(), "shape": list(ids.shape), "dtype": "uint8"}
            for ids in in_place(r, 0)
        ],
        E,
        **o,
    ),
    "nemo-rl": lambda r, **o: from_nemo_rl(
        [
            f"nrlre1:int8:{len(ids)}x{L}x{K}:{base64.b64encode(ids.astype(np.int8).tobytes()).decode()}"
            for ids in in_place(r, -1)
        ],
        E,
        **o,
    ),
}


@pytest.mark.parametrize("engine", LOADERS)
def test_the_routing_comes_back(engine, routing, tmp_path):
    trace = LOADERS[engine](routing, token_ids=TOKEN_IDS)
    check(trace, routing)
    check(LOADERS[engine](routing, moe_layer_ids=[1, 2]), routing)
    trace.save(tmp_path / "trace.npz")
    again = RoutingTrace.load(tmp_path / "trace.npz")
    np.testing.assert_array_equal(again.expert_ids, trace.expert_ids)
    check(again, routing)


@pytest.mark.parametrize("engine", LOADERS)
def test_routing_that_is_one_token_off_is_refused(engine, routing):
    too_short = [TOKEN_IDS[0], TOKEN_IDS[1][:-1], TOKEN_IDS[2]]
    with pytest.raises(InputError, match=r"sequence 1 has [56] rows, but its 5 tokens need [45]"):
        LOADERS[engine](routing, token_ids=too_short)
    with pytest.raises(InputError, match="num_tokens has 2 entries"):
        LOADERS[engine](routing, token_ids=TOKEN_IDS[:2])


@pytest.mark.parametrize("engine", LOADERS)
def test_tokens_that_were_not_recorded(engine, routing):
    """A row of zeros would be expert 0, K times."""
    routing[1][2] = 0
    with pytest.raises(InputError, match=r"sequence 1 has no routing for 1 tokens, the first is token 2.*--holes"):
        LOADERS[engine](routing)
    trace = LOADERS[engine](routing, holes="unknown")
    assert np.flatnonzero(trace.unknown).tolist() == [3, 6, 9, 10]
    assert count_loads(trace, np.zeros(3, int)).sum() == 7 * 2 * K  # not one of them is counted
    routing[1][2], routing[1][-1] = routing[1][3], 0  # the last one that must be there
    with pytest.raises(InputError, match="sequence 1 has no routing for 1 tokens, the first is token 4"):
        LOADERS[engine](routing)
    with pytest.raises(InputError, match="holes is 'ignore'"):
        LOADERS[engine](routing, holes="ignore")


@pytest.mark.parametrize("engine", LOADERS)
def test_what_cannot_be_routing_is_refused(engine, routing):
    spoiled = [ids.copy() for ids in routing]
    spoiled[1][3, 1] = spoiled[1][3, 1, 0] = 5
    with pytest.raises(InputError, match=r"sequence 1 of token 3, layer 1 are \[5, 5\]: an expert is chosen twice"):
        LOADERS[engine](spoiled)
    spoiled = [ids.copy() for ids in routing]
    spoiled[0][1, 2, 0] = E
    with pytest.raises(InputError, match="sequence 0 names expert 16, but there are 16"):
        LOADERS[engine](spoiled)
    with pytest.raises(InputError, match="3 layers were recorded"):
        LOADERS[engine](routing, moe_layer_ids=[1, 3])
    if engine not in ("verl, padded", "verl, packed"):  # one array for all sequences
        with pytest.raises(InputError, match="empty"):
            LOADERS[engine]([])


def test_a_layer_of_zeros_is_ambiguous_with_one_choice_a_token():
    ids = [np.stack([np.zeros(5, np.uint8), np.arange(5, dtype=np.uint8)], 1)[:, :, None]]
    with pytest.raises(InputError, match=r"zeros only in layer 0: .*--moe-layers"):
        from_vllm(ids, E)
    assert from_vllm(ids, E, moe_layer_ids=[1]).num_layers == 1
    both = from_vllm(ids, E, moe_layer_ids=[0, 1])
    assert both.num_layers == 2 and both.expert_ids[0, 1, 0] == 0 and not both.unknown[:-1].any()


def test_many_experts_need_wider_ids(routing):
    wide = [np.where(ids > 0, ids + 400, 0).astype(np.uint16) for ids in routing]
    trace = from_vllm(wide, 512)
    assert trace.expert_ids.dtype == np.int16 and trace.expert_ids.max() > 400


def test_vllm_refuses_other_arrays(routing):
    good = routing[0].astype(np.uint8)
    with pytest.raises(ShapeError, match="sequence 1 is float64"):
        from_vllm([good, routing[0].astype(float)], E)
    with pytest.raises(ShapeError, match="sequence 1 has 1 layers and 2 choices"):
        from_vllm([good, good[:, :1]], E)
    with pytest.raises(FormatError, match="not base64"):
        from_vllm(["***"], E)
    with pytest.raises(FormatError, match=r"not the base64 of a \.npy"):
        from_vllm([base64.b64encode(b"text").decode()], E)
    with pytest.raises(FormatError, match=r"not the base64 of a \.npy"):
        from_vllm([npy(np.array([{}], object))], E)


def test_sglang_has_no_header(routing):
    blob = base64.b64encode(routing[0].astype("<i4").tobytes()).decode()
    with pytest.raises(FormatError, match=r"72 bytes, which do not make int32 of shape \[rows, 4, 2\]"):
        from_sglang([blob], E, num_layers=4, top_k=K)
    with pytest.raises(FormatError, match="71 bytes"):
        from_sglang([base64.b64encode(routing[0].astype("<i4").tobytes()[:-1]).decode()], E, num_layers=L, top_k=K)
    with pytest.raises(InputError, match="top_k is 0"):
        from_sglang([blob], E, num_layers=L, top_k=0)


def test_sglang_statistics():
    counts = [[0] * 4, [1, 2, 3, 4], [5, 0, 0, 5]]
    loads = loads_from_sglang({"logical_count": counts}, 4)
    assert loads.dtype == np.int32 and loads.tolist() == [[counts[1]], [counts[2]]]
    np.testing.assert_array_equal(loads_from_sglang({"logical_count": np.array(counts, float).tolist()}, 4), loads)
    for statistics, message in (
        ({"rank": 0}, "no 'logical_count'"),
        ({"logical_count": counts[0]}, r"shape \(4,\)"),
        ({"logical_count": [[1], [1, 2]]}, "rectangular"),
        ({"logical_count": [[0] * 4]}, "zero everywhere"),
    ):
        with pytest.raises(FormatError, match=message):
            loads_from_sglang(statistics, 4)
    with pytest.raises(FormatError, match="5 experts"):
        loads_from_sglang({"logical_count": counts}, 5)


def test_verl_padding_is_where_the_mask_says(routing):
    rows, mask = padded(routing)
    with pytest.raises(InputError, match="sequence 0 has no routing for 1 tokens, the first is token 0"):
        from_verl(np.roll(rows, 1, axis=1), E, attention_mask=mask)  # the last token's zeros hide it at the end
    with pytest.raises(InputError, match="row 0 has routing where attention_mask is 0"):
        from_verl(np.roll(rows, -1, axis=1), E, attention_mask=mask)
    with pytest.raises(InputError, match="needs attention_mask if it is padded, or cu_seqlens"):
        from_verl(rows, E)
    with pytest.raises(InputError, match="sequence 1 has 9 rows, but its 6 tokens need 6"):
        from_verl(list(rows), E, attention_mask=mask)
    with pytest.raises(ShapeError, match="attention_mask"):
        from_verl(rows, E, attention_mask=mask[:2])
    packed = np.concatenate(in_place(routing, 0)).astype(np.int16)
    for cu_seqlens, message in (
        ([0, 4, 10], "ends at 10, but|sequence 1 has"),
        ([0, 4, 3, 11], "must rise"),
        ([0, 4, 12], "must rise"),
        ([0, 5, 10, 11], "sequence 0 has no routing"),  # one token off
    ):
        if cu_seqlens == [0, 4, 10]:
            packed[10] = packed[0]
        with pytest.raises(InputError, match=message):
            from_verl(packed, E, cu_seqlens=cu_seqlens)
        packed[10] = 0


def test_slime_padding_is_cut_off_where_it_is_padding(routing):
    def pad(ids, rows):
        return np.concatenate([ids, np.arange(rows * L * K).reshape(rows, L, K) % E]).astype(np.int32)

    for samples in ([pad(ids, 1) for ids in routing], [pad(pad(ids, 1), 3) for ids in routing]):
        check(from_slime(samples, E, token_ids=TOKEN_IDS, moe_layer_ids=[1, 2]), routing)
    shifted = [np.concatenate([ids[:1], ids]).astype(np.int32) for ids in routing[:2]]
    with pytest.raises(InputError, match="sequence 0 has 4 rows, but its 4 tokens need 3"):
        from_slime(shifted, E, token_ids=TOKEN_IDS[:2])


def test_prime_rl_and_nemo_rl_refuse_what_does_not_fit(routing):
    sample = {"data": bytes(2 * L * K), "shape": [2, L, K], "dtype": "uint8"}
    for change, message in (
        ({"shape": [3, L, K]}, "12 bytes, which do not make uint8"),
        ({"shape": [-1, L, K]}, "three sizes"),
        ({"shape": [2, L]}, "three sizes"),
        ({"dtype": "float32"}, "dtype 'float32'"),
        ({"data": "***"}, "not base64"),
    ):
        with pytest.raises(FormatError, match=message):
            from_prime_rl([{**sample, **change}], E)
    with pytest.raises(FormatError, match="no 'dtype'"):
        from_prime_rl([{"data": b"", "shape": []}], E)
    text = base64.b64encode(sample["data"]).decode()
    for envelope in (f"nrlre2:int8:2x{L}x{K}:{text}", f"nrlre1:float:2x{L}x{K}:{text}", "nrlre1"):
        with pytest.raises(FormatError, match="sequence 0 starts with"):
            from_nemo_rl([envelope], E)
    with pytest.raises(FormatError, match="do not make int16"):
        from_nemo_rl([f"nrlre1:int16:2x{L}x{K}:{text}"], E)
    json_sample = {"data": base64.b64encode(in_place(routing, 0)[0].astype(np.uint8).tobytes()).decode()}
    assert from_prime_rl([{**json_sample, "shape": [4, L, K], "dtype": "uint8"}], E).num_tokens == 4


def test_megatron_records_every_token(routing):
    whole = [np.concatenate([ids, ids[:1] if len(ids) else routing[0][:1]]) for ids in routing]
    routers = [np.concatenate([ids[:, layer] for ids in whole]) for layer in (1, 2)]  # dense layers have no router
    trace = from_megatron(routers, E, sequence_lengths=LENGTHS, moe_layer_ids=[1, 2])
    check(trace, routing, last_known=True)
    assert from_megatron(routers, E).num_sequences == 1
    with pytest.raises(InputError, match="sum to 10, but 11 tokens"):
        from_megatron(routers, E, sequence_lengths=[4, 6])
    with pytest.raises(ShapeError, match=r"\[\(11, 2\), \(10, 2\)\]"):
        from_megatron([routers[0], routers[1][:-1]], E)
    routers[0][5, 1] = routers[0][5, 0]
    with pytest.raises(InputError, match="chosen twice"):
        from_megatron(routers, E)


def test_megatron_lines(routing):
    ids = routing[1][:, 1:]
    lines = [
        {"step": step, "layer": layer, "rank": rank, "num_tokens": 5, "topk": K, "top_indices": top.tolist()}
        for step, rank in ((1, 0), (0, 1), (0, 0))
        for layer, top in ((2, ids[:, 1]), (1, (ids[:, 0] + step + 2 * rank) % E))
    ]
    trace = from_megatron_lines(lines, E)
    assert trace.moe_layer_ids == (1, 2) and trace.offsets.tolist() == [0, 5, 10, 15]
    np.testing.assert_array_equal(trace.sequence(0), ids)  # step 0, rank 0; then rank 1; then step 1
    np.testing.assert_array_equal(trace.sequence(1)[:, 0], (ids[:, 0] + 2) % E)
    np.testing.assert_array_equal(trace.sequence(2)[:, 0], (ids[:, 0] + 1) % E)
    for change, message in (
        ({"top_indices": lines[0]["top_indices"][:-1]}, "line 1 has 4 tokens"),
        ({"top_indices": [[1], [2, 3]]}, "line 1 must have integers"),
        ({"layer": 1}, "repeats layer 1 of step 1, rank 0"),
        ({"layer": 3}, r"step 0, rank 0 has layers \[1, 2\].*\[1, 2, 3\]"),
    ):
        with pytest.raises((InputError, FormatError), match=message):
            from_megatron_lines([{**lines[0], **change}, *lines[1:]], E)
    with pytest.raises(FormatError, match="no 'topk'"):
        from_megatron_lines([{k: v for k, v in lines[0].items() if k != "topk"}], E)
    with pytest.raises(FormatError, match="at least one"):
        from_megatron_lines([], E)
