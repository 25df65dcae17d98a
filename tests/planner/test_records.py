"""Kinds of records that users meet, over all engines: dtypes, holes, masks, lost layers, parts, aborted samples."""

import itertools
import logging

import numpy as np
import pytest
import torch
from records import (
    ENGINES,
    IN_PLACE,
    LENGTHS,
    PARTS,
    E,
    K,
    L,
    b64,
    check,
    check_rows,
    envelope,
    in_parts,
    in_place,
    load,
    make,
    padded,
    payload,
)

from relibra_kernels.planner import (
    FormatError,
    InputError,
    ShapeError,
    count_loads,
    from_megatron,
    from_nemo_rl,
    from_prime_rl,
    from_sglang,
    from_slime,
    from_verl,
    from_vllm,
)
from relibra_kernels.planner.trace_report import LAST_TOKEN, MASKED, NO_ROUTING, NOT_RECORDED, OUTSIDE, REASONS

DTYPES = (np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64)


@pytest.mark.parametrize("experts", [16, 200, 256, 384, 40_000])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_integer_dtype_that_holds_the_ids(engine, experts):
    for dtype in DTYPES:
        ids = make(experts, dtype=np.int64)
        if np.iinfo(dtype).max >= experts - 1:
            trace = load(engine, [rows.astype(dtype) for rows in ids], experts, num_tokens=LENGTHS)
            check(trace, ids)
            assert trace.compact_ids.itemsize == (1 if experts <= 256 else 2)
        elif engine not in ("sglang", "sglang response", "vllm as lists"):  # whose integers have a width of their own
            with pytest.raises(ShapeError, match=r"sequence 0 is u?int\d+, which cannot hold the ids of"):
                load(engine, [(rows % 100).astype(dtype) for rows in ids], experts, num_tokens=LENGTHS)


def test_tensors_are_taken_as_arrays_are():
    ids = make()
    check(from_vllm([torch.from_numpy(rows) for rows in ids], E, num_tokens=LENGTHS), ids)
    rows, mask = padded([in_place(rows, 0) for rows in ids])
    check(from_verl(torch.from_numpy(rows), E, attention_mask=torch.from_numpy(mask).bool()), ids)
    routers = [torch.from_numpy(np.concatenate([rows[:, layer] for rows in ids])) for layer in range(L)]
    trace = from_megatron(routers, E, sequence_lengths=[n - 1 for n in LENGTHS])
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate(ids))
    with pytest.raises((FormatError, ShapeError), match="sequence 1"):
        from_vllm([ids[0], ids[1].astype(float)], E)
    with pytest.raises((FormatError, ShapeError), match="sequence 0"):
        from_vllm([[[[1, 2], [3]]]], E)


@pytest.mark.parametrize("value", [0, -1, "sentinel", "part of a row"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_hole_in_one_layer_makes_just_that_token_unknown(engine, value, caplog):
    dtype = np.uint8 if value == "sentinel" else np.int16
    ids = make(dtype=dtype)
    if value == "sentinel" and engine.startswith("sglang") | (engine == "vllm as lists"):
        value = -1
        ids = make()
    if value == "part of a row":
        ids[1][4, 1, 1] = -1
    else:
        ids[1][4, 1] = np.iinfo(dtype).max if value == "sentinel" else value
    with pytest.raises(
        InputError, match=r"sequence 1 has no routing for 1 tokens, .* token 4 in layers \[1\].*--holes"
    ):
        load(engine, ids, E, num_tokens=LENGTHS)
    with caplog.at_level(logging.WARNING):
        trace = load(engine, ids, E, num_tokens=LENGTHS, holes="unknown")
    assert "1 tokens of unknown routing: not recorded by the engine" in caplog.text
    assert np.flatnonzero(trace.unknown).tolist() == [4, 9, 13, 15]
    known = ~trace.unknown
    np.testing.assert_array_equal(trace.expert_ids[known], np.concatenate([in_place(r, 0) for r in ids])[known])
    assert trace.report.unknown == {REASONS[LAST_TOKEN]: 3, REASONS[NOT_RECORDED]: 1}
    assert count_loads(trace, np.zeros(3, int)).sum() == known.sum() * L * K


@pytest.mark.parametrize("engine", ENGINES)
def test_with_one_choice_zeros_are_expert_0(engine):
    ids = make(top_k=1)
    ids[0][:2] = 0
    if engine == "nemo-rl":  # whose filled rows are 0 as well: only the last is one for sure
        ids[2][-1] = 3
        ids[0][-1] = ids[1][-1] = 3
    trace = load(engine, ids, E, moe_layer_ids=range(L), num_tokens=LENGTHS)
    if engine in IN_PLACE and engine != "nemo-rl":  # zeros of the last token cannot be told from expert 0
        assert not trace.unknown.any()
        return
    check(trace, ids)
    ids[1][3] = -1
    assert load(engine, ids, E, moe_layer_ids=range(L), holes="unknown", num_tokens=LENGTHS).unknown[8]


@pytest.mark.parametrize("engine", ENGINES)
def test_layers_without_routing(engine):
    dense = make(layers=6)
    for ids in dense:
        ids[:, :2] = 0
    trace = load(engine, dense, E, num_tokens=LENGTHS)
    assert trace.moe_layer_ids == (2, 3, 4, 5) and trace.report.layers_dropped == (0, 1)
    check(trace, [ids[:, 2:] for ids in dense])
    lost = make(layers=6)
    for ids in lost:
        ids[:, [2, 4, 5]] = 0
    with pytest.raises(InputError, match=r"no routing in the layers \[2, 4, 5\], which come after MoE layers"):
        load(engine, lost, E)
    named = load(engine, lost, E, moe_layer_ids=[0, 1, 3], num_tokens=LENGTHS)
    check(named, [ids[:, [0, 1, 3]] for ids in lost])
    with pytest.raises(InputError, match="tokens, the first is token 0 in layers"):
        load(engine, lost, E, moe_layer_ids=range(6))


@pytest.mark.parametrize("engine", PARTS)
def test_parts_are_put_where_they_begin(engine):
    (full,) = make(lengths=(13,))
    turns = [(0, full[:4]), (4, full[4:9]), (9, full[9:])]
    check(in_parts(engine, turns, E, num_tokens=[13]), [full], (13,))
    check(in_parts(engine, [(None, ids) for _, ids in turns], E, num_tokens=[13]), [full], (13,))
    overlapping = [(0, (full[:7] + 1) % E), (3, full[3:9]), (0, full[:2]), (2, full[2:])]  # later ones win
    check(in_parts(engine, overlapping, E, num_tokens=[13]), [full], (13,))
    retracted = in_parts(engine, [(0, full[:10]), (3, full[3:5])], E)  # and what came after is void
    check(retracted, [full[:5]], (6,)) if engine != "prime-rl, payloads" else check_rows(retracted, full[:5])
    whole_again = [(None, full[:4]), (None, full[:9]), (None, full)]  # every turn recorded all before it
    check(in_parts(engine, whole_again, E, num_tokens=[13]), [full], (13,))

    gap = [(0, full[:4]), (6, full[6:])]
    with pytest.raises(InputError, match="sequence 0 has no routing for 2 tokens, the first is token 4"):
        in_parts(engine, gap, E, num_tokens=[13])
    suffix = in_parts(engine, [(5, full[5:])], E, num_tokens=[13], holes="unknown")
    assert (suffix.reasons[:5] == OUTSIDE).all() and suffix.reasons[12] == LAST_TOKEN
    np.testing.assert_array_equal(suffix.expert_ids[5:12], full[5:])
    short = in_parts(engine, [(2, full[2:7])], E, num_tokens=[13], holes="unknown")
    assert (short.expert_ids[2:7] == full[2:7]).all() and short.unknown.sum() == 8
    for options in ({}, {"holes": "unknown"}):  # a suffix that nobody placed is no sequence
        with pytest.raises(InputError, match="placed with starts"):
            in_parts(engine, [(None, full[5:])], E, num_tokens=[13], **options)
    for start in (-1, 3.5, "3", True):
        with pytest.raises(InputError, match="start"):
            in_parts(engine, [(start, full)], E, num_tokens=[13])


def test_a_payload_and_the_caller_must_agree_on_the_start():
    (full,) = make(lengths=(13,), dtype=np.uint8)
    with pytest.raises(InputError, match="must agree"):
        from_prime_rl([payload(full[5:], 5)], E, starts=[4], num_tokens=[13], holes="unknown")
    trace = from_prime_rl([payload(full[5:], 5)], E, starts=[5], num_tokens=[13], holes="unknown")
    assert (trace.sequence(0)[5:12] == full[5:]).all()
    word = {"routed_experts": b64(full[5:].astype("<i4")), "routed_experts_start_len": 5, "start": 6}
    with pytest.raises(InputError, match="must agree"):
        from_sglang([word], E, num_layers=L, top_k=K, num_tokens=[13], holes="unknown")


def test_versions_of_spans_are_kept():
    full = make(lengths=(13,))[0]
    turns = [
        {"routed_experts": full[:6], "weight_version": "7"},
        {"routed_experts": full[4:], "start": 4, "weight_version": 8},
    ]
    trace = from_vllm([full[:3], turns], E, num_tokens=[4, 13])
    assert [tuple(span) for span in trace.versions] == [(1, 0, 4, "7"), (1, 4, 13, "8")]
    chosen = trace.select([1, 0]).slice_positions(2, 6)
    assert [tuple(span) for span in chosen.versions] == [(0, 0, 2, "7"), (0, 2, 4, "8")]


def spans(*cuts):
    """[{"version", "start", "end"}] of the tokens that were generated, a policy after the other from version 7 on."""
    pairs = itertools.pairwise(cuts)
    return [{"version": str(7 + i), "start": start, "end": end} for i, (start, end) in enumerate(pairs)]


def test_weights_that_changed_within_a_generation():
    """vLLM and SGLang say which of the generated tokens each policy sampled; the prompt's rows are the first one's."""
    full = make(lengths=(13,))[0]
    once = {"routed_experts": full, "weight_versions": spans(0, 4, 6)}  # 7 tokens of prompt
    assert [tuple(span) for span in from_vllm([once], E).versions] == [(0, 0, 11, "7"), (0, 11, 13, "8")]
    turns = [
        {"routed_experts": full[:6], "weight_versions": spans(0, 3)},
        {"routed_experts": full[6:], "routed_experts_start_len": 6, "weight_versions": spans(0, 1, 4)},
    ]
    trace = from_vllm([turns], E, num_tokens=[13])
    assert [tuple(span) for span in trace.versions] == [(0, 0, 6, "7"), (0, 6, 10, "7"), (0, 10, 13, "8")]
    meta = {"routed_experts": b64(full.astype("<i4")), "weight_versions": spans(0, 2, 5, 6), "weight_version": "9"}
    trace = from_sglang([{"meta_info": meta}], E, num_layers=L, top_k=K)
    assert [tuple(span) for span in trace.versions] == [(0, 0, 9, "7"), (0, 9, 12, "8"), (0, 12, 13, "9")]
    for wrong in ("7", 7, [7], [{"version": "7"}], spans(1, 3), spans(0, 3) + spans(4, 5), [{"start": 0, "end": 3}]):
        with pytest.raises(FormatError, match="sequence 0 has the weight_versions"):
            from_vllm([{**once, "weight_versions": wrong}], E)


def test_a_response_says_how_long_its_sequence_is():
    """Rows end with the last token but one: a suffix is no whole sequence, and a turn is put where it ends."""
    full = make(lengths=(13,))[0]

    def response(ids, prompt, generated, **more):
        lengths = {"prompt_tokens": prompt, "completion_tokens": generated}
        return {"meta_info": {"routed_experts": b64(ids.astype("<i4")), **lengths, **more}}

    def loaded(*turns, **options):
        return from_sglang([list(turns)], E, num_layers=L, top_k=K, **options)

    for options in ({}, {"holes": "unknown"}):
        with pytest.raises(InputError, match="sequence 0 has 8 rows from token 0 on, but says that it has 13 tokens"):
            loaded(response(full[4:], 9, 4), **options)
        with pytest.raises(InputError, match="has 12 rows from token 0 on, but says that it has 12 tokens"):
            loaded(response(full, 8, 4), **options)
        with pytest.raises(InputError, match="has 8 rows from token 3 on"):
            loaded(response(full[4:], 9, 4, routed_experts_start_len=3), **options)
    placed = loaded(response(full[4:], 9, 4, routed_experts_start_len=4), holes="unknown")
    assert (placed.reasons[:4] == OUTSIDE).all() and not placed.report.assumed
    check_rows(placed.slice_positions(4, 12), full[4:])

    first, wrong = response(full[:6], 4, 3), (full[:5] + 1) % E
    for second in (response(full[6:], 9, 4), response(full[3:], 9, 4), response(full, 9, 4)):  # from anywhere before
        trace = loaded(first, second)
        check(trace, [full], (13,))
        assert not trace.report.assumed
        check(loaded(response(wrong, 4, 2), response(full, 9, 4)), [full], (13,))
    with pytest.raises(InputError, match="has 5 rows from token 6 on, but says that it has 13 tokens"):
        loaded(first, response(full[7:], 9, 4))

    aborted = {"meta_info": {"prompt_tokens": 5, "completion_tokens": 0}}
    sizes = {"num_layers": L, "top_k": K, "holes": "unknown"}
    trace = from_sglang([aborted, response(full, 9, 4)], E, **sizes)
    assert np.diff(trace.offsets).tolist() == [5, 13] and trace.report.sequences_without_routing == (0,)
    for wrong_length in ("x", -1, 2.5, True):
        with pytest.raises(FormatError, match="they must be numbers of tokens"):
            loaded(response(full, 9, wrong_length))


def test_without_a_length_the_loader_says_what_it_assumed(caplog):
    ids = make()
    for engine in ENGINES:
        caplog.clear()
        trace = load(engine, ids, E)
        known = engine in ("verl, padded", "verl, packed")  # whose mask or offsets say it
        assert bool(trace.report.assumed) is not known
        assert ("begin at token 0" in caplog.text) is not known
        assert not load(engine, ids, E, num_tokens=LENGTHS).report.assumed


@pytest.mark.parametrize("engine", ENGINES)
def test_a_length_that_is_not_that_of_the_rows_is_refused(engine):
    either = engine.startswith("prime-rl") or engine == "verl, jagged"  # the row of the last token may be there or not
    for lengths in ((5, 7, 2), (5, 12, 2)) if either else ((5, 8, 2), (5, 10, 2), (4, 9, 2)):
        with pytest.raises(InputError, match=r"sequence \d has \d+ rows, but its"):
            load(engine, make(), E, num_tokens=lengths)
    with pytest.raises(InputError, match="num_tokens has 2 entries"):
        load(engine, make(), E, num_tokens=(5, 9))


@pytest.mark.parametrize("nothing", [None, np.zeros(0, np.uint8), np.zeros((0, L, K), np.int16), []])
def test_aborted_samples(nothing):
    good = make(lengths=(7,))[0]
    for loader, rows in (
        (from_vllm, good),
        (from_slime, good),
        (from_prime_rl, good),
        (from_nemo_rl, in_place(good, -1)),
        (from_verl, in_place(good, 0)),
        (lambda ids, *a, **o: from_sglang(ids, *a, num_layers=L, top_k=K, **o), good),
    ):
        for order in ([rows, nothing], [nothing, rows]):
            lengths = [7 if part is rows else 5 for part in order]
            with pytest.raises(InputError, match="no routing for 4 tokens"):
                loader(order, E, num_tokens=lengths)
            trace = loader(order, E, num_tokens=lengths, holes="unknown")
            empty = lengths.index(5)
            assert (trace.sequence(empty) == -1).all() and (trace.sequence(1 - empty)[:6] == good).all()
            assert trace.report.sequences_without_routing == (empty,)
            assert trace.report.unknown[REASONS[NO_ROUTING]] == 4
    with pytest.raises(InputError, match="length is not known"):
        from_vllm([good, None], E, holes="unknown")
    with pytest.raises(InputError, match="holds no routing at all"):
        from_vllm([None], E, num_tokens=[5], holes="unknown")


def multi_turn(fill=0):
    """Two samples of which only some tokens were generated, and a padding sample; response masks and routing."""
    ids = [in_place(rows, fill) for rows in make(lengths=(9, 8, 3))]
    ids[0][6:], ids[2][:] = fill, fill  # ends in a tool result; padding
    response = np.zeros((3, 6), np.int64)
    response[0, :3], response[1, :6] = 1, 1
    return ids, response


@pytest.mark.parametrize("fill", [0, -1])
def test_masks_say_which_tokens_need_routing(fill):
    ids, response = multi_turn(fill)
    with pytest.raises(InputError, match="sequence 0 has no routing for 2 tokens, the first is token 6"):
        from_verl(ids, E)
    masks = [response[0], response[1], response[2][:2]]
    jagged = from_verl(ids, E, response_mask=masks)
    rows = np.zeros((3, 12, L, K), np.int16)
    attention = np.zeros((3, 12), np.int64)
    for i, sequence in enumerate(ids):  # prompts end at column 6
        prompt = len(sequence) - len(masks[i])
        rows[i, 6 - prompt : 6 + len(masks[i])], attention[i, 6 - prompt : 6 + len(masks[i])] = sequence, 1
    from_padded = from_verl(rows, E, attention_mask=attention, response_mask=response)
    for trace in (jagged, from_padded):
        assert trace.reasons.tolist() == [0] * 6 + [MASKED] * 2 + [1] + [0] * 7 + [1] + [MASKED] * 2 + [1]
        assert (trace.sequence(0)[:6] == ids[0][:6]).all() and (trace.sequence(1)[:7] == ids[1][:7]).all()
    ids[1][3, 2] = fill  # of the generated tokens one is missing all the same
    with pytest.raises(
        InputError, match=r"sequence 1 has no routing for 1 tokens, the first is token 3 in layers \[2\]"
    ):
        from_verl(ids, E, response_mask=masks)


def test_jagged_tensors_are_taken_as_they_are():
    """As verl keeps all of a batch once padding was removed."""

    def jagged(arrays):
        return torch.nested.as_nested_tensor([torch.from_numpy(array) for array in arrays], layout=torch.jagged)

    ids = [in_place(rows.astype(np.int16), 0) for rows in make()]
    ids[2][:] = 0  # verl's padding sample
    masks = [np.ones(2, np.int64), np.ones(3, np.int64), np.zeros(1, np.int64)]
    trace = from_verl(jagged(ids), E, num_tokens=LENGTHS, response_mask=jagged(masks))
    assert trace.report.sequences_without_routing == () and (trace.sequence(2) == -1).all()
    for index in (0, 1):
        np.testing.assert_array_equal(trace.sequence(index)[:-1], ids[index][:-1])
    kept = [np.arange(len(rows)) < 2 for rows in ids]
    replayed = from_verl(jagged(ids[:2]), E, num_tokens=LENGTHS[:2], replay_mask=jagged(kept[:2]))
    assert np.flatnonzero(~replayed.unknown).tolist() == [0, 1, 5, 6]
    for loader in (from_vllm, from_slime, from_prime_rl):
        with pytest.raises(FormatError, match="is no array"):
            loader([jagged(ids)], E)
        with pytest.raises(FormatError, match="is no array"):
            loader([torch.zeros(4, L, K, dtype=torch.bfloat16)], E)


def test_a_replay_mask_says_what_is_replayed():
    ids = [in_place(rows, 0) for rows in make()]
    replay = [np.ones(n, int) for n in LENGTHS]
    replay[1][2:5] = 0
    for trace in (
        from_verl(ids, E, replay_mask=replay),
        from_verl(np.concatenate(ids), E, cu_seqlens=np.cumsum([0, *LENGTHS]), replay_mask=np.concatenate(replay)),
    ):
        assert np.flatnonzero(trace.reasons == MASKED).tolist() == [7, 8, 9]
    with pytest.raises(ShapeError, match=r"replay_masks of .*sequence 1 .* bool \[9\]"):
        from_verl(ids, E, replay_mask=[replay[0], replay[0], replay[2]])


def test_an_attention_mask_may_have_gaps():
    whole = [in_place(rows, 0) for rows in make()]
    rows, mask = np.zeros((3, 12, L, K), np.int16), np.zeros((3, 12), np.int64)
    for i, ids in enumerate(whole):  # padding between prompt and answer
        places = [0, *range(12 - len(ids) + 1, 12)]
        rows[i, places], mask[i, places] = ids, 1
    check(from_verl(rows, E, attention_mask=mask), [ids[:-1] for ids in whole])


def test_rows_of_padding_behind_a_sequence_are_cut_off():
    ids = make()
    tails = [np.concatenate([in_place(rows, 0), np.zeros((3, L, K), np.int16)]) for rows in ids]
    for loader in (from_verl, from_vllm, from_prime_rl):
        check(loader(tails, E, num_tokens=LENGTHS), ids)
    with pytest.raises(InputError, match="sequence 0 has 8 rows, but its 4 tokens need"):  # also one that is shifted
        from_verl(tails, E, num_tokens=[4, 9, 2])
    fillers = [np.concatenate([rows, np.broadcast_to(np.arange(K), (4, L, K))]) for rows in ids]
    check(from_nemo_rl([envelope(rows.astype(np.int16)) for rows in fillers], E, num_tokens=LENGTHS), ids)
    fillers[0][1] = np.arange(K)  # inside of a sequence a router may have chosen that
    assert (from_nemo_rl(fillers, E, num_tokens=LENGTHS).sequence(0)[1] == np.arange(K)).all()
