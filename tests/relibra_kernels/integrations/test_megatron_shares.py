"""Shares of tokens under context and sequence parallelism: each token once, in Megatron's order, no routing lost."""

import numpy as np
import pytest
import torch

from relibra_kernels import RoutedBatch
from relibra_kernels.integrations import megatron
from relibra_kernels.integrations.megatron_shares import TokenShare
from relibra_kernels.planner import RoutingTrace
from relibra_kernels.planner.errors import InputError, ShapeError

LENGTHS = (12, 9, 1, 16, 7)


def make_trace():
    """Two layers, top 2 of 8; unknown: last tokens, and some where shares of a sequence end."""
    random = np.random.default_rng(0)
    offsets = np.cumsum([0, *LENGTHS])
    ids = random.random((offsets[-1], 2, 8)).argsort(-1)[..., :2].astype(np.int16)
    ids[offsets[1:] - 1] = -1
    ids[[3, 7, offsets[3] + 11]] = -1
    return RoutingTrace(ids, offsets, 8, (0, 1))


def shares(context, sequence, zigzag=True):
    return [[TokenShare(c, context, s, sequence, zigzag) for s in range(sequence)] for c in range(context)]


def cut_as_megatron(whole_SB, context, sequence):
    """[context][sequence] parts of [S, B] input: two chunks of positions each, and of those consecutive parts."""
    chunks = whole_SB.view(2 * context, -1, *whole_SB.shape[1:]) if context > 1 else whole_SB[None]
    parts = [torch.cat([chunks[c], chunks[2 * context - 1 - c]]) if context > 1 else chunks[0] for c in range(context)]
    return [[part.flatten() for part in of_context.chunk(sequence)] for of_context in parts]


@pytest.mark.parametrize(("context", "sequence"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (1, 4)])
def test_padded_shares_are_megatrons(context, sequence):
    trace, length = make_trace(), 16
    starts = zip(trace.offsets.tolist(), LENGTHS, strict=False)
    whole = torch.tensor([[start + t if t < n else -1 for t in range(length)] for start, n in starts]).T
    expected = cut_as_megatron(whole, context, sequence)
    for c, row in enumerate(shares(context, sequence)):
        for s, share in enumerate(row):
            assert share.padded_rows(trace, length).tolist() == expected[c][s].tolist()


@pytest.mark.parametrize(("context", "sequence"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize("layout", ["verl", "slime"])
def test_packed_shares_have_every_token_once(context, sequence, zigzag, layout):
    """verl pads every sequence for both, slime for context parallelism and then what a rank has of all."""
    trace = make_trace()
    chunks = context * (2 if zigzag and context > 1 else 1)
    sizes = {"each": chunks * sequence} if layout == "verl" else {"total": 8 * sequence}
    seen, lengths = [], set()
    for row in shares(context, sequence, zigzag):
        together = [share.packed_rows(trace, **sizes) for share in row]
        lengths |= {len(part) for part in together}
        own = np.concatenate(together)  # consecutive parts of what the context parallel rank has
        alone = TokenShare(row[0].context_rank, context, zigzag=zigzag).packed_rows(trace, **sizes)
        assert own.tolist() == np.pad(alone, (0, len(own) - len(alone)), constant_values=-1).tolist()
        seen += own[own >= 0].tolist()
    assert len(lengths) == 1 and sorted(seen) == list(range(trace.num_tokens))
    if layout == "slime":
        assert lengths.pop() % 8 == 0


def test_packed_chunks_of_a_sequence_are_the_ones_of_its_rank():
    trace = RoutingTrace(np.zeros((6, 1, 1), np.int8), [0, 6], 2, (0,))
    assert TokenShare(0, 2).packed_rows(trace).tolist() == [0, 1, -1, -1]  # padded to 8: chunks 0 and 3
    assert TokenShare(1, 2).packed_rows(trace).tolist() == [2, 3, 4, 5]
    assert TokenShare(1, 2, zigzag=False).packed_rows(trace).tolist() == [3, 4, 5]
    assert TokenShare(1, 2, 1, 2).packed_rows(trace).tolist() == [4, 5]


@pytest.mark.parametrize(("context", "sequence"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_batches_of_all_ranks_are_the_whole_batch(context, sequence):
    """Loads add up; each rank replays its tokens; what is unknown is live on the rank that has it, and only there."""
    trace = make_trace()
    whole = RoutedBatch(trace, np.array([0, 1, 1, 0, 1]), 2)
    loads, live = 0, 0
    for share in (share for row in shares(context, sequence) for share in row):
        batch = share.of_batch(whole, lambda part, share=share: share.padded_rows(part, 16))
        loads, live = loads + batch.loads(), live + int(batch.live.sum())
        for m in range(2):
            part = trace.select(whole.sequences(m))
            fed, rows = share.padded_rows(part, 16), batch.rows[m]
            here = batch.trace.select(batch.sequences(m))
            assert ((rows >= 0) == (fed >= 0)).all()
            np.testing.assert_array_equal(here.rows(rows), part.rows(fed))
            needed = batch.needed(m)
            assert np.isin(np.flatnonzero(needed), rows).all()  # whatever must be fed is
    np.testing.assert_array_equal(loads, whole.loads())
    assert live == int(whole.live.sum()) == 3


def test_a_rank_without_tokens_has_a_batch():
    """Of a short sequence only the first chunks are there."""
    trace = RoutingTrace(np.zeros((2, 1, 1), np.int8), [0, 2], 2, (0,))
    share = TokenShare(1, 2)
    batch = share.of_batch(RoutedBatch(trace, np.zeros(1, int), 1), lambda part: share.padded_rows(part, 8))
    assert batch.trace.num_tokens == 0 and batch.rows[0].tolist() == [-1] * 4 and not batch.loads().any()


def test_replay_targets_of_a_share():
    trace, share = make_trace(), TokenShare(1, 2, 0, 2)
    rows = share.padded_rows(trace, 16)
    targets = torch.stack(megatron.replay_targets(trace, rows=rows, whole=False, holes="live"), 1).numpy()
    known = (rows >= 0) & ~trace.unknown[rows]
    np.testing.assert_array_equal(targets[known], trace.expert_ids[rows[known]])
    holes = np.isin(rows, [3, 7, trace.offsets[3] + 11])
    assert holes.any() and (targets[holes] == -1).all() and (targets[~holes] >= 0).all()


def test_what_is_no_share_is_refused():
    trace = make_trace()
    for arguments, message in (
        ((2, 2), "context_rank is 2"),
        ((-1, 2), "context_rank is -1"),
        ((0, 1, 1, 1), "sequence_rank is 1"),
        ((0.5, 2), "context_rank is 0.5"),
    ):
        with pytest.raises(InputError, match=message):
            TokenShare(*arguments)
    share = TokenShare(0, 2, 0, 2)
    with pytest.raises(InputError, match="sequence_length is 18; it must be a multiple of 4"):
        share.padded_rows(trace, 18)
    with pytest.raises(InputError, match=r"sequence_length is 12; it .* holds the longest sequence, of 16"):
        share.padded_rows(trace, 12)
    with pytest.raises(InputError, match="each is 6"):
        share.packed_rows(trace, each=6)
    whole = RoutedBatch(trace, np.zeros(5, int), 1)
    with pytest.raises(InputError, match="batch is of 2 ranks"):
        dealt = RoutedBatch(trace, np.zeros(5, int), 1, rank_of_sequence=np.array([0, 0, 1, 1, 1]), num_ranks=2)
        share.of_batch(dealt, lambda part: share.padded_rows(part, 16))
    for rows in ([0, 0], [45]):
        with pytest.raises(ShapeError, match="names a row twice, or one beyond the 45"):
            share.of_batch(whole, lambda part, rows=rows: np.array(rows))
