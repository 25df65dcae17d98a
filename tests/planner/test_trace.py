"""RoutingTrace: what it accepts, and how it refuses the rest."""

import itertools
import pickle
import tracemalloc
from functools import partial

import numpy as np
import pytest

from relibra_kernels.planner import FormatError, InputError, ReLibraError, RoutingTrace
from relibra_kernels.planner.trace_report import LAST_TOKEN
from relibra_kernels.planner.trace_writer import TraceWriter


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
    "wrong", [[True, False, True], np.array([True, False, True]), slice(0, 2), 1, [0.5], "01", [[0], [1]], None]
)
def test_sequences_and_layers_are_named_by_numbers(wrong, tmp_path):
    """A mask would be taken for the sequences 0 and 1."""
    trace = small_trace()
    trace.save(tmp_path / "t.npz")
    calls = [lambda: trace.select(wrong), lambda: trace.slice_layers(wrong)]
    if wrong is not None:
        calls += [partial(RoutingTrace.load, tmp_path / "t.npz", **{key: wrong}) for key in ("sequences", "layers")]
    for call in calls:
        with pytest.raises(InputError, match=r"but must be integers \(of a mask"):
            call()
    assert trace.select(np.array([2, 0], np.uint8)).num_tokens == trace.select(iter([2, 0])).num_tokens == 12


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


@pytest.mark.parametrize(("num_experts", "width"), [(100, 1), (128, 1), (129, 1), (256, 1), (257, 2), (40_000, 2)])
def test_an_id_takes_one_byte_up_to_256_experts_and_two_beyond(num_experts, width, tmp_path):
    ids = np.array([[[0, num_experts - 1]], [[-1, -1]], [[num_experts - 1, 3]]], np.int64)
    trace = RoutingTrace(ids, [0, 3], num_experts, [0])
    trace.save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as file:
        assert file["expert_ids"].itemsize == width
        if num_experts in (100, 128, 257):  # other readers see -1 where it costs nothing
            np.testing.assert_array_equal(file["expert_ids"], ids)
    for same in (trace, RoutingTrace.load(tmp_path / "t.npz"), pickle.loads(pickle.dumps(trace))):
        assert same.compact_ids.itemsize == width and same.unknown.tolist() == [False, True, False]
        np.testing.assert_array_equal(same.expert_ids, ids)
        np.testing.assert_array_equal(same.sequence(0), ids)
        np.testing.assert_array_equal(same.rows(np.array([2, -1, 1])), [ids[2], [[-1, -1]], [[-1, -1]]])
    signed = np.int64 if num_experts > 32_768 else np.int16
    np.savez(tmp_path / "old.npz", expert_ids=ids.astype(signed), offsets=[0, 3], num_experts=num_experts)
    np.testing.assert_array_equal(RoutingTrace.load(tmp_path / "old.npz").expert_ids, ids)


@pytest.mark.parametrize(
    ("dtype", "num_experts"), [(">i2", 200), (">i2", 300), (">u2", 257), (">u2", 40_000), (">i4", 300), (">u8", 257)]
)
def test_ids_of_the_other_byte_order(dtype, num_experts, tmp_path):
    """Those that are as wide as they are kept are not the same bytes."""
    ids = np.array([[[1, 0]], [[num_experts - 1, 5]]])
    trace = RoutingTrace(ids.astype(dtype), [0, 2], num_experts, [0])
    np.testing.assert_array_equal(trace.expert_ids, ids)
    trace.save(tmp_path / "t.npz")
    np.testing.assert_array_equal(RoutingTrace.load(tmp_path / "t.npz").expert_ids, ids)


def test_the_narrowest_ids_are_not_copied():
    ids = small_trace().expert_ids.copy()
    trace = RoutingTrace(ids, [0, 5, 5, 12], 16, range(3))
    assert np.shares_memory(trace.compact_ids, ids) and np.shares_memory(trace.expert_ids, ids)


def test_shares_are_those_of_the_whole(tmp_path):
    trace = small_trace(lengths=(5, 0, 7, 3))
    trace = RoutingTrace(trace.expert_ids, trace.offsets, 16, (1, 4, 6), layers_dropped=(0,))
    layers = trace.slice_layers([1, 6])
    np.testing.assert_array_equal(layers.expert_ids, trace.expert_ids[:, [0, 2]])
    assert layers.moe_layer_ids == (1, 6) and layers.unknown.tolist() == trace.unknown.tolist()
    part = trace.slice_positions(1, np.array([3, 3, 9, 0]))
    assert np.diff(part.offsets).tolist() == [2, 0, 6, 0]
    np.testing.assert_array_equal(part.sequence(2), trace.sequence(2)[1:])
    assert part.reasons[-1] == LAST_TOKEN and not np.shares_memory(part.compact_ids, trace.compact_ids)
    for path, write in ((tmp_path / "t.npz", trace.save), (tmp_path / "z.npz", lambda p: squeeze(trace, p))):
        write(path)
        for sequences, numbers in itertools.product((None, [2, 0], [3], []), (None, [4], [1, 6])):
            share = RoutingTrace.load(path, sequences=sequences, layers=numbers)
            expected = trace if sequences is None else trace.select(sequences)
            expected = expected if numbers is None else expected.slice_layers(numbers)
            np.testing.assert_array_equal(share.expert_ids, expected.expert_ids)
            assert share.offsets.tolist() == expected.offsets.tolist() and share.moe_layer_ids == expected.moe_layer_ids
    for call, message in (
        (lambda: trace.slice_layers([4, 5]), r"moe_layer_ids is \[4, 5\]"),
        (lambda: trace.slice_positions(-1), "start is -1"),
        (lambda: RoutingTrace.load(tmp_path / "t.npz", sequences=[4]), r"t\.npz: sequences are \[4\]"),
        (lambda: RoutingTrace.load(tmp_path / "t.npz", layers=[0]), r"t\.npz: layers are \[0\]"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def squeeze(trace, path):
    """Compressed, and in the order of columns: both are read too, the second not in parts."""
    arrays = {"expert_ids": trace.expert_ids, "offsets": trace.offsets, "num_experts": trace.num_experts}
    np.savez_compressed(path, **arrays, moe_layer_ids=trace.moe_layer_ids)


def test_loading_a_share_needs_memory_for_the_share(tmp_path):
    """A hundredth of 1,536 sequences x 32k tokens x 47 layers x top-4; a rank has an eighth of the sequences."""
    sequences, tokens, layers = 48, 10_700, 47
    ids = (np.arange(sequences * tokens * layers, dtype=np.int64) % 61).astype(np.int8)
    ids = np.stack([ids, ids + 61], 1).repeat(2, 1).reshape(-1, layers, 4)
    ids[..., 1::2] += 1
    trace = RoutingTrace(ids, np.arange(sequences + 1) * tokens, 128, range(layers))
    trace.save(tmp_path / "t.npz")
    whole = trace.compact_ids.nbytes
    assert whole > 95e6 and (tmp_path / "t.npz").stat().st_size < 1.02 * whole
    shares = (({"sequences": range(6)}, whole / 8), ({"layers": range(6)}, whole * 6 / 47), ({}, whole))
    for options, size in shares:
        tracemalloc.start()
        share = RoutingTrace.load(tmp_path / "t.npz", **options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.1 * size + 32e6, (options, peak, size)
        assert share.compact_ids.nbytes == pytest.approx(size)


def test_a_trace_is_written_batch_after_batch(tmp_path):
    trace = small_trace(lengths=(5, 0, 7, 3))
    writer = TraceWriter(tmp_path / "parts.npz")
    for part in ([0], [1, 2], [3]):
        writer.append(trace.select(part))
    with pytest.raises(InputError, match=r"moe_layer_ids is \(0, 1\) from sequence 4 on, but was \(0, 1, 2\) before"):
        writer.append(trace.slice_layers([0, 1]))
    assert writer.report == trace.report
    writer.close()
    trace.save(tmp_path / "whole.npz")
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"parts.npz", "whole.npz"}
    with pytest.raises(InputError, match="there is no sequence"):
        TraceWriter(tmp_path / "none.npz").close()
