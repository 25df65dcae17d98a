"""RoutingTrace: what it accepts, and how it refuses the rest."""

import itertools

import numpy as np
import pytest

from relibra_kernels.planner import FormatError, InputError, ReLibraError, RoutingTrace


def random_ids(rng, tokens, layers, top_k, num_experts, dtype=np.int8):
    return rng.random((tokens, layers, num_experts)).argsort(-1)[..., :top_k].astype(dtype)


def small_trace(num_experts=16, lengths=(5, 0, 7), layers=3, top_k=4, seed=0):
    ids = random_ids(np.random.default_rng(seed), sum(lengths), layers, top_k, num_experts)
    offsets = np.cumsum([0, *lengths])
    for start, end in itertools.pairwise(offsets):
        if end > start:
            ids[end - 1] = -1
    return RoutingTrace(ids, offsets, num_experts, tuple(range(layers)))


def test_properties():
    trace = small_trace()
    assert (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_sequences) == (12, 3, 4, 3)
    assert np.flatnonzero(trace.unknown).tolist() == [4, 11]
    assert trace.only_last_tokens_unknown
    assert trace.sequence(2).shape == (7, 3, 4)
    assert trace.sequence(2).base is not None
    assert len(trace.sequence(1)) == 0


def test_unknown_rows_inside_a_sequence_are_seen():
    trace = small_trace()
    ids = trace.expert_ids.copy()
    ids[7] = -1
    assert not RoutingTrace(ids, trace.offsets, 16, trace.moe_layer_ids).only_last_tokens_unknown


def test_select_keeps_the_order_that_was_asked_for():
    trace = small_trace()
    chosen = trace.select([2, 0])
    np.testing.assert_array_equal(chosen.expert_ids, np.concatenate([trace.sequence(2), trace.sequence(0)]))
    assert chosen.offsets.tolist() == [0, 7, 12]
    assert trace.select([]).num_tokens == 0
    with pytest.raises(InputError, match="sequence 3"):
        trace.select([3])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda ids: ids.__setitem__((1, 2, 0), 16), r"token 1, layer 2 names expert 16"),
        (lambda ids: ids.__setitem__((1, 2, 0), -2), r"token 1, layer 2 names expert -2"),
        (lambda ids: ids.__setitem__((6, 1), 0), r"token 6, layer 1 are \[0, 0, 0, 0\]: .*twice"),
        (lambda ids: ids.__setitem__((6, 1, 0), ids[6, 1, 3]), r"token 6, layer 1"),
        (lambda ids: ids.__setitem__((6, 1), -1), r"token 6 are -1 in part"),
        (lambda ids: ids.__setitem__((6, 1, 3), -1), r"token 6 are -1 in part"),
    ],
)
def test_bad_ids_are_refused(spoil, message):
    trace = small_trace()
    ids = trace.expert_ids.copy()
    spoil(ids)
    with pytest.raises(InputError, match=message):
        RoutingTrace(ids, trace.offsets, 16, trace.moe_layer_ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": np.array([0, 5, 5, 11])}, "run from 0 to 11"),
        ({"offsets": np.array([1, 5, 5, 12])}, "run from 1 to 12"),
        ({"offsets": np.array([0, 7, 5, 12])}, "decrease at sequence 1"),
        ({"offsets": np.array([0.0, 12.0])}, "float64"),
        ({"expert_ids": np.zeros((12, 3, 4), np.float32)}, "float32"),
        ({"num_experts": "many"}, "num_experts is 'many', but must be an integer"),
        ({"num_experts": 1 << 17}, "num_experts is 131072"),
        ({"expert_ids": np.zeros((12, 12), np.int8)}, r"\(12, 12\)"),
        ({"num_experts": 3}, "num_experts is 3"),
        ({"num_experts": 200}, "int8, which cannot hold the ids of 200 experts"),
        ({"moe_layer_ids": (0, 1)}, "3 increasing"),
        ({"moe_layer_ids": (0, 2, 1)}, "3 increasing"),
    ],
)
def test_bad_arrays_are_refused(change, message):
    trace = small_trace()
    good = {name: getattr(trace, name) for name in ("expert_ids", "offsets", "num_experts", "moe_layer_ids")}
    with pytest.raises(InputError, match=message):
        RoutingTrace(**{**good, **change})


def test_save_and_load(tmp_path):
    trace = small_trace()
    trace.save(tmp_path / "trace.npz")
    again = RoutingTrace.load(tmp_path / "trace.npz")
    np.testing.assert_array_equal(again.expert_ids, trace.expert_ids)
    np.testing.assert_array_equal(again.offsets, trace.offsets)
    assert (again.num_experts, again.moe_layer_ids) == (16, (0, 1, 2))
    with pytest.raises(InputError, match="recorded with 16"):
        RoutingTrace.load(tmp_path / "trace.npz", num_experts=8)


def test_load_without_num_experts(tmp_path):
    trace = small_trace()
    np.savez(tmp_path / "bare.npz", expert_ids=trace.expert_ids, offsets=trace.offsets)
    with pytest.raises(FormatError, match=r"bare\.npz.*num_experts"):
        RoutingTrace.load(tmp_path / "bare.npz")
    assert RoutingTrace.load(tmp_path / "bare.npz", num_experts=16).moe_layer_ids == (0, 1, 2)
    with pytest.raises(InputError, match=r"bare\.npz.*expert"):
        RoutingTrace.load(tmp_path / "bare.npz", num_experts=8)


@pytest.mark.parametrize("kind", ["missing", "truncated", "pickled", "key", "text", "npy"])
def test_bad_files_are_refused(tmp_path, kind):
    path = tmp_path / "bad.npz"
    trace = small_trace()
    if kind == "truncated":
        trace.save(path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "pickled":
        np.savez(path, expert_ids=np.array([{}], object), offsets=trace.offsets, num_experts=16)
    elif kind == "key":
        np.savez(path, expert_ids=trace.expert_ids, num_experts=16)
    elif kind == "text":
        path.write_text("not an archive")
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, trace.expert_ids)
    with pytest.raises(FormatError, match=r"bad\.npz"):
        RoutingTrace.load(path)


def test_damage_inside_an_array_is_seen(tmp_path):
    path = tmp_path / "bad.npz"
    small_trace(lengths=(500,)).save(path)
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ReLibraError, match=r"bad\.npz"):
        RoutingTrace.load(path)
