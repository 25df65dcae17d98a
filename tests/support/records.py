"""Recorded routing written as each engine does, from one description of what the model did."""

import base64
import io

import numpy as np

from relibra_kernels.planner import from_nemo_rl, from_prime_rl, from_sglang, from_slime, from_verl, from_vllm

L, K, E = 3, 2, 16
LENGTHS = (5, 9, 2)
IN_PLACE = ("verl, jagged", "verl, padded", "verl, packed", "prime-rl", "nemo-rl")
PARTS = (
    "verl, jagged",
    "nemo-rl",
    "vllm",
    "vllm over HTTP",
    "vllm as lists",
    "sglang",
    "sglang response",
    "slime",
    "prime-rl, payloads",
)


def random_ids(rng, rows, layers, top_k, experts):
    """int64 [rows, layers, top_k], distinct experts a token."""
    if experts <= 64:
        return rng.random((rows, layers, experts)).argsort(-1)[..., :top_k]
    stride = rng.integers(1, experts // top_k, (rows, layers, 1))
    return (rng.integers(0, experts, (rows, layers, 1)) + stride * np.arange(top_k)) % experts


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def b64(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def envelope(ids):
    return f"nrlre1:{ids.dtype.name}:{'x'.join(map(str, ids.shape))}:{b64(ids)}"


def payload(ids, start=None):
    return {"data": b64(ids), "shape": list(ids.shape), "dtype": ids.dtype.name} | (
        {} if start is None else {"start": start}
    )


def in_place(ids, fill):
    """[N, L, K] with a row of `fill` for the last token."""
    return np.concatenate([ids, np.full((1, *ids.shape[1:]), fill, ids.dtype)])


def padded(sequences):
    """verl's [bs, j, L, K] and attention mask: prompts are padded left, answers right."""
    longest = max(map(len, sequences)) + 3
    rows = np.zeros((len(sequences), longest, *sequences[0].shape[1:]), sequences[0].dtype)
    mask = np.zeros(rows.shape[:2], np.int64)
    for i, ids in enumerate(sequences):
        first = i % 3
        rows[i, first : first + len(ids)], mask[i, first : first + len(ids)] = ids, 1
    return rows, mask


def load(engine, routing, experts, **options):
    """The trace of [N - 1, L, K] a sequence, written as `engine` would, in the dtype that the arrays have."""
    layers, top_k = routing[0].shape[1:]
    whole = [in_place(ids, 0) for ids in routing]
    match engine:
        case "vllm":
            return from_vllm(routing, experts, **options)
        case "vllm over HTTP":
            return from_vllm([npy(ids) for ids in routing], experts, **options)
        case "vllm as lists":
            return from_vllm([ids.tolist() for ids in routing], experts, **options)
        case "sglang":
            words = [b64(ids.astype("<i4")) for ids in routing]
            return from_sglang(words, experts, num_layers=layers, top_k=top_k, **options)
        case "sglang response":
            words = [{"meta_info": {"routed_experts": b64(ids.astype("<i4"))}} for ids in routing]
            return from_sglang(words, experts, num_layers=layers, top_k=top_k, **options)
        case "slime":
            return from_slime(routing, experts, **options)
        case "verl, jagged":
            return from_verl(whole, experts, **options)
        case "verl, padded":
            rows, mask = padded(whole)
            return from_verl(rows, experts, attention_mask=mask, **options)
        case "verl, packed":
            tail = np.zeros((5, layers, top_k), routing[0].dtype)
            offsets = np.cumsum([0, *map(len, whole)])
            return from_verl(np.concatenate([*whole, tail])[None], experts, cu_seqlens=offsets, **options)
        case "prime-rl":
            return from_prime_rl([payload(ids) for ids in whole], experts, **options)
        case "prime-rl, payloads":
            return from_prime_rl([payload(ids) for ids in routing], experts, **options)
        case "nemo-rl":
            fillers = [np.concatenate([ids, np.broadcast_to(np.arange(top_k), (1, layers, top_k)).astype(ids.dtype)])
                       for ids in routing]  # fmt: skip
            return from_nemo_rl([envelope(ids) for ids in fillers], experts, **options)
    raise AssertionError(engine)


ENGINES = ("vllm", "vllm over HTTP", "vllm as lists", "sglang", "sglang response", "slime", "verl, jagged",
           "verl, padded", "verl, packed", "prime-rl", "prime-rl, payloads", "nemo-rl")  # fmt: skip


def in_parts(engine, cuts, experts, **options):
    """The trace of one sequence from parts (start or None, ids [n, L, K]), as engines hand them over turn by turn."""
    layers, top_k = cuts[0][1].shape[1:]
    starts = [start for start, _ in cuts]
    match engine:
        case "vllm":
            return from_vllm([[ids for _, ids in cuts]], experts, starts=[starts], **options)
        case "vllm over HTTP":
            turns = [{"routed_experts": npy(ids), "routed_experts_prompt_start": start} for start, ids in cuts]
            return from_vllm([turns], experts, **options)
        case "vllm as lists":
            return from_vllm([[ids.tolist() for _, ids in cuts]], experts, starts=[starts], **options)
        case "sglang" | "sglang response":
            turns = [
                {"meta_info": {"routed_experts": b64(ids.astype("<i4")), "routed_experts_start_len": start}}
                for start, ids in cuts
            ]
            return from_sglang([turns], experts, num_layers=layers, top_k=top_k, **options)
        case "slime":
            return from_slime([[ids for _, ids in cuts]], experts, starts=[starts], **options)
        case "verl, jagged" | "nemo-rl":  # a row for the last token too
            turns = [ids for _, ids in cuts]
            turns[-1] = in_place(turns[-1], 0)
            if engine == "nemo-rl":
                return from_nemo_rl([[envelope(ids) for ids in turns]], experts, starts=[starts], **options)
            return from_verl([turns], experts, starts=[starts], **options)
        case "prime-rl, payloads":
            return from_prime_rl([[payload(ids, start) for start, ids in cuts]], experts, **options)
    raise AssertionError(engine)


def make(experts=E, layers=L, top_k=K, lengths=LENGTHS, dtype=np.int16, seed=0):
    rng = np.random.default_rng(seed)
    return [random_ids(rng, n - 1, layers, top_k, experts).astype(dtype) for n in lengths]


def check(trace, routing, lengths=LENGTHS):
    assert np.diff(trace.offsets).tolist() == list(lengths)
    for index, ids in enumerate(routing):
        np.testing.assert_array_equal(trace.sequence(index)[:-1], ids)
        assert (trace.sequence(index)[-1] == -1).all()


def check_rows(trace, rows):
    np.testing.assert_array_equal(trace.expert_ids, rows)
