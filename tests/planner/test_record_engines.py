"""What single engines record in a way of their own: fillers, padding, MTP routers, dtypes."""

import numpy as np
import pytest
import torch
from records import LENGTHS, E, K, L, b64, check, check_rows, envelope, make

from relibra_kernels.planner import (
    FormatError,
    InputError,
    ShapeError,
    from_megatron,
    from_megatron_lines,
    from_nemo_rl,
    from_sglang,
    from_slime,
)
from relibra_kernels.planner.trace_report import NOT_RECORDED, OUTSIDE


@pytest.mark.parametrize("dense", [0, 1])
def test_nemo_rl_fills_in_tool_results(dense):
    """0..K-1 in every layer: nothing that routers of 12 layers choose by accident, wherever it stands."""
    ids = make(layers=12)
    for rows in ids:
        rows[:, :dense] = 0
    whole = [np.concatenate([rows, np.broadcast_to(np.arange(K), (1, 12, K))]) for rows in ids]
    whole[1][2:4] = np.arange(K)  # a tool result that no later turn fed
    whole[1][6] = -1
    for given in (whole, [envelope(rows.astype(np.int8)) for rows in whole], [rows.tolist() for rows in whole]):
        with pytest.raises(InputError, match="sequence 1 has no routing for 3 tokens, the first is token 2"):
            from_nemo_rl(given, E)
        trace = from_nemo_rl(given, E, holes="unknown")
        assert np.flatnonzero(trace.reasons == NOT_RECORDED).tolist() == [7, 8, 11]
        np.testing.assert_array_equal(trace.sequence(1)[4:6], ids[1][4:6, dense:])
        assert trace.moe_layer_ids == tuple(range(dense, 12))


@pytest.mark.parametrize(("dtype", "experts"), [("uint8", 200), ("uint16", 384), ("int32", 384)])
def test_sglang_says_the_dtype_of_its_bytes(dtype, experts):
    """Beside the payload; without it they are int32."""
    ids = make(experts, dtype=dtype)
    sizes = {"num_layers": L, "top_k": K, "num_tokens": LENGTHS}
    fields = [{"routed_experts": b64(rows), "routed_experts_dtype": dtype} for rows in ids]
    check(from_sglang(fields, experts, **sizes), ids)
    check(from_sglang([{"meta_info": meta} for meta in fields], experts, **sizes), ids)
    turns = [
        {**fields[1], "routed_experts": b64(ids[1][first:stop]), "routed_experts_start_len": first}
        for first, stop in ((0, 3), (3, 8))
    ]
    check(from_sglang([fields[0], turns, fields[2]], experts, **sizes), ids)
    with pytest.raises(FormatError, match=r"sequence 0 .*the dtype 'float16'"):
        from_sglang([{**fields[0], "routed_experts_dtype": "float16"}], experts, num_layers=L, top_k=K)
    with pytest.raises(ShapeError, match="uint8"):
        from_sglang([{**fields[0], "routed_experts_dtype": "uint8"}], 384, num_layers=L, top_k=K)


@pytest.mark.parametrize("form", [np.asarray, torch.from_numpy, np.ndarray.tolist])
def test_slime_padding_behind_rows_that_begin_later(form):
    ids = make(dtype=np.int32)
    padding = (np.arange(2 * L * K) % E).reshape(2, L, K).astype(np.int32)
    padded_ids = [form(np.concatenate([rows, padding])) for rows in (ids[0], ids[1][4:])] + [form(ids[2])]
    says_itself = [padded_ids[0], {"routed_experts": padded_ids[1], "start": 4}, padded_ids[2]]
    in_turns = [padded_ids[0], [form(ids[1][:6]), {"routed_experts": padded_ids[1], "start": 4}], padded_ids[2]]
    late = [
        from_slime(padded_ids, E, num_tokens=LENGTHS, starts=[None, 4, None], holes="unknown"),
        from_slime(padded_ids, E, num_tokens=LENGTHS, starts=torch.tensor([0, 4, 0]), holes="unknown"),
        from_slime(says_itself, E, num_tokens=LENGTHS, holes="unknown"),
    ]
    for trace in late:
        assert np.flatnonzero(trace.reasons == OUTSIDE).tolist() == [5, 6, 7, 8]
        np.testing.assert_array_equal(trace.sequence(1)[4:8], ids[1][4:])
        np.testing.assert_array_equal(trace.sequence(0)[:4], ids[0])
    check(from_slime(in_turns, E, num_tokens=LENGTHS), ids)
    with pytest.raises(InputError, match="they must agree"):
        from_slime(says_itself, E, num_tokens=LENGTHS, starts=torch.tensor([0, 3, 0]))


def test_sglang_responses_without_routing():
    """Aborted before anything was computed, or with all that was recorded cut off by the request's own start."""
    ids = make()[0]
    words = b64(ids.astype("<i4"))
    for nothing in (
        {"meta_info": {"id": "x"}},
        {"meta_info": {"routed_experts": None}},
        {"routed_experts": "", "routed_experts_start_len": 4},
        {"routed_experts": "", "routed_experts_start_len": 5},
    ):
        sizes = {"num_layers": L, "top_k": K, "num_tokens": [5, 5]}
        trace = from_sglang([words, nothing], E, **sizes, holes="unknown")
        assert trace.report.sequences_without_routing == (1,)
        np.testing.assert_array_equal(trace.sequence(0)[:4], ids)
        with pytest.raises(InputError, match="sequence 1 has no routing"):
            from_sglang([words, nothing], E, **sizes)


def test_megatron_lines_of_mtp_routers_are_left_out(caplog):
    ids = make()[1]
    lines = [
        {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0, "num_tokens": len(ids),
         "topk": K, "top_indices": ids[:, layer].tolist()}
        for layer in range(L)
    ]  # fmt: skip
    mtp = {**lines[0], "block": "mtp", "mtp_idx": 0}
    trace = from_megatron_lines([mtp, *lines, mtp], E)
    np.testing.assert_array_equal(trace.expert_ids, ids)
    assert trace.report.assumed == ("2 lines of MTP routers are of no layer of the model",)
    assert not from_megatron_lines(lines, E).report.assumed
    with pytest.raises(FormatError, match="line 1 must have integers"):
        from_megatron_lines([{**lines[0], "top_indices": (ids[:, 0] + 0.5).tolist()}, *lines[1:]], E)


def test_slime_pads_with_minus_one_after_a_tool():
    ids = [rows.astype(np.int32) for rows in make()]
    ids[1][5:] = -1
    trace = from_slime(ids, E, num_tokens=LENGTHS, holes="unknown")
    assert np.flatnonzero(trace.reasons == NOT_RECORDED).tolist() == [10, 11, 12]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int8, np.int16, np.int32, np.int64])
def test_megatron_ids_of_every_dtype(dtype):
    ids = np.concatenate(make()).astype(dtype)
    check_rows(from_megatron([ids[:, layer] for layer in range(L)], E), ids)
    if np.dtype(dtype).itemsize == 1:
        with pytest.raises(ShapeError, match="have wrapped around"):
            from_megatron([ids[:, layer] for layer in range(L)], 384)


@pytest.mark.parametrize("fill", [0, -1])
def test_a_megatron_router_without_routing_is_refused(fill):
    """Every router of the model has a layer: one that was not recorded is no dense layer."""
    ids = np.concatenate(make())
    routers = [ids[:, layer].copy() for layer in range(L)]
    for lost in (0, L - 1):
        gone = [np.full_like(rows, fill) if layer == lost else rows for layer, rows in enumerate(routers)]
        with pytest.raises(InputError, match=rf"no routing for {len(ids) - 1} tokens, .* in layers \[{lost}\]"):
            from_megatron(gone, E)


def test_megatron_holes():
    ids = np.concatenate(make())
    routers = [ids[:, layer].copy() for layer in range(L)]
    routers[1][4] = -1
    with pytest.raises(InputError, match="no routing for 1 tokens, the first is token 4"):
        from_megatron(routers, E)
    trace = from_megatron(routers, E, holes="unknown", moe_layer_ids=[2, 3, 5])
    assert np.flatnonzero(trace.unknown).tolist() == [4] and trace.moe_layer_ids == (2, 3, 5)
