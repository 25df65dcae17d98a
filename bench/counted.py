"""Bytes and FLOPs that the kernels issue, over the least that they could: counted in Triton's interpreter, no GPU.

    python bench/counted.py [--trace TRACE.npz]

Routing: log-normal expert popularity with E = 128, K = 8 over 8 ranks, and a recorded trace where there is one. Bytes:
every element of every load and store that is not masked off; the minimum reads each needed input once and writes each
output once. FLOPs: every multiply-add of every tile product, with the tiles that an sm_90 gets, on the rank whose rows
fill them worst; useful are those of real rows. H and I are two blocks there, since the ratio depends on rows alone.
What tiles compute past the last column of a weight is counted apart, for the nine models with the tiles of an H100. The
last line is a JSON object with the worst case of each.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if os.environ.setdefault("TRITON_INTERPRET", "1") != "1":
    sys.exit("TRITON_INTERPRET must be 1 or unset")

import numpy as np
import torch
import triton.language as tl
from padded_columns import columns_issued
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from relibra_kernels import kernels
from relibra_kernels.configs.config import GemmConfig
from relibra_kernels.configs.limits import DEVICES
from relibra_kernels.configs.products import PRODUCTS
from relibra_kernels.configs.spaces import config_for
from relibra_kernels.form import ExpertForm
from relibra_kernels.payload import PayloadLayout
from relibra_kernels.reference import build_schedule
from relibra_kernels.schedule import Schedule
from relibra_kernels.tuning.models import MODELS

TRACE = Path(__file__).parents[2] / "shared/data/gptoss20b_routing.npz"
TOKENS_PER_RANK, RANKS = 4096, 8
DTYPE = torch.float16


@dataclass
class Count:
    bytes: int = 0
    flops: int = 0


@contextmanager
def counting(*, compute: bool) -> Iterator[Count]:
    """Count what kernels issue within the block. Without `compute`, tiles are neither loaded nor multiplied."""
    count = Count()
    load, store, dot = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        InterpreterBuilder.create_dot,
    )

    def counted_load(self, ptrs, mask, other, *rest):
        element = ptrs.get_element_ty()
        count.bytes += int(mask.data.sum()) * element.primitive_bitwidth // 8
        if not compute and ptrs.data.ndim == 2:
            return TensorHandle(np.zeros(ptrs.data.shape, np.float16 if element == tl.float16 else np.float32), element)
        return load(self, ptrs, mask, other, *rest)

    def counted_store(self, ptrs, value, mask, *rest):
        count.bytes += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return store(self, ptrs, value, mask, *rest) if compute or ptrs.data.ndim < 2 else None

    def counted_dot(self, a, b, d, *rest):
        (m, k), n = a.data.shape, b.data.shape[1]
        count.flops += 2 * m * n * k
        return dot(self, a, b, d, *rest) if compute else d

    replaced = {"create_masked_load": counted_load, "create_masked_store": counted_store, "create_dot": counted_dot}
    before = {name: getattr(InterpreterBuilder, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(InterpreterBuilder, name, function)
        yield count
    finally:
        for name, function in before.items():
            setattr(InterpreterBuilder, name, function)


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def generated(experts: int = 128, top_k: int = 8) -> np.ndarray:
    """Expert ids `[tokens of all ranks, K]`, log-normally popular: max/mean over experts is about 7."""
    random = np.random.default_rng(0)
    popularity = random.normal(0, 1.1, experts)
    scores = popularity + random.gumbel(size=(TOKENS_PER_RANK * RANKS, experts))
    return np.argpartition(-scores, top_k, axis=1)[:, :top_k]


def recorded(path: Path, layer: int = 12) -> np.ndarray:
    with np.load(path) as trace:
        ids = trace["expert_ids"][: TOKENS_PER_RANK * RANKS, layer].astype(np.int64)
    return ids[(ids >= 0).all(1)]


def unpermute_bytes(ids: np.ndarray, experts: int, hidden_size: int) -> dict[str, float]:
    """The weighted sum of rows by token, for 128 tokens of the routing."""
    slots = torch.from_numpy(np.ascontiguousarray(ids[:128]))
    schedule = build_schedule(slots, experts)
    rows = torch.zeros(schedule.num_rows, hidden_size, dtype=DTYPE)
    weights = torch.zeros(slots.shape, dtype=torch.float32)
    with counting(compute=True) as unpermute:
        out = kernels.unpermute(rows, weights, schedule)
    return {"unpermute": unpermute.bytes / bytes_of(rows, weights, schedule.position_of, out)}


def payload_bytes(ids: np.ndarray, experts: int, hidden_size: int) -> dict[str, float]:
    """Dispatch of 128 tokens to all ranks in one payload: packed, and taken apart where it arrives."""
    per_rank = experts // RANKS
    slot = torch.from_numpy((ids[:128] % per_rank).astype(np.int16))
    pairs, row = np.unique(ids[:128] // per_rank + RANKS * np.arange(len(slot))[:, None], return_inverse=True)
    row = torch.from_numpy(row.reshape(slot.shape))
    slots = torch.full((len(pairs), slot.shape[1]), -1, dtype=torch.int16)
    token = torch.arange(len(slot))[:, None].expand_as(slot)
    choice = torch.arange(slot.shape[1]).expand_as(slot)
    slots[row, choice] = slot
    earlier = torch.ones(slot.shape[1], slot.shape[1], dtype=torch.bool).tril(-1)
    again = ((row[:, :, None] == row[:, None]) & earlier).any(-1)
    position = torch.where(again, -1, row).int()
    assignment = torch.zeros(len(pairs), dtype=torch.int32)
    assignment[row[~again]] = (token * slot.shape[1] + choice)[~again].int()
    send = Schedule(torch.tensor([0, len(pairs)], dtype=torch.int32), assignment, position)
    x, weights = torch.zeros(len(slot), hidden_size, dtype=DTYPE), torch.zeros(slot.shape, dtype=torch.float32)
    layout = PayloadLayout(hidden_size, slot.shape[1], DTYPE)
    payload = layout.new(len(pairs), x.device)
    with counting(compute=True) as pack:
        kernels.pack_payload(x, weights, slots, send, payload)
    with counting(compute=True) as unpack:
        parts = kernels.unpack_payload(payload, layout)
    return {
        "pack_payload": pack.bytes / (bytes_of(x, weights, slots, position) + bytes_of(*parts)),
        "unpack_payload": unpack.bytes / (2 * bytes_of(*parts)),
    }


def reduction_bytes(shape: tuple[int, ...], experts: int, place: list[int]) -> float:
    """Shards of `place`'s experts into a rank's buffer."""
    grad, shards = torch.zeros(experts, *shape), torch.zeros(len(place), *shape)
    with counting(compute=True) as count:
        kernels.replica_reduce(grad, shards, torch.tensor(place, dtype=torch.int32))
    touched = len({expert for expert in place if expert >= 0})
    used = sum(expert >= 0 for expert in place)
    return count.bytes / ((2 * touched + used) * bytes_of(grad[0]))


def gemm_flops(slots: torch.Tensor, experts: int) -> dict[str, float]:
    """Issued over useful FLOPs of every GEMM for one rank's assignments, with the tiles that an sm_90 gets."""
    used = int((slots >= 0).sum())
    schedule = build_schedule(slots, experts, num_rows=used)
    tokens, form = len(slots), ExpertForm()
    ratios = {}

    def zeros(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=DTYPE)

    def gate_up(c: GemmConfig) -> int:
        intermediate_size, hidden = 2 * c.block_n, 2 * c.block_k
        weight = zeros(experts, 2 * intermediate_size, hidden)
        kernels.grouped_gemm_swiglu(zeros(tokens, hidden), weight, schedule, form, config=c)
        return 2 * intermediate_size * hidden

    def grouped_gemm(c: GemmConfig) -> int:
        n, d = 2 * c.block_n, 2 * c.block_k
        kernels.grouped_gemm(zeros(used, d), zeros(experts, n, d), schedule, transpose_weight=True, config=c)
        return n * d

    def grad_hidden(c: GemmConfig) -> int:
        intermediate_size, hidden = 2 * c.block_n, 2 * c.block_k
        dout, h, down = (
            zeros(tokens, hidden),
            zeros(used, 2 * intermediate_size),
            zeros(experts, hidden, intermediate_size),
        )
        kernels.grad_hidden(dout, h, torch.zeros(slots.shape), down, schedule, form, config=c)
        return intermediate_size * hidden

    def grad_weight(c: GemmConfig) -> int:
        n, d = 2 * c.block_m, 2 * c.block_n
        grad = torch.zeros(experts, n, d)
        kernels.grad_weight(zeros(used, n), zeros(tokens, d), schedule, grad, gather_right=True, config=c)
        return n * d

    for call in (gate_up, grouped_gemm, grad_hidden, grad_weight):
        config = config_for(call.__name__, DEVICES["sm_90"], torch.bfloat16, used, experts)
        with counting(compute=False) as counted:
            flops_per_row = 2 * call(config)
        ratios[call.__name__] = counted.flops / (used * flops_per_row)
    return ratios


def worst_rank(ids: np.ndarray, experts: int) -> torch.Tensor:
    """Slots `[T, K]` of the rank whose rows fill their tiles of 128 worst; tokens without a local expert left out."""
    per_rank = experts // RANKS
    loads = np.bincount(ids.ravel(), minlength=experts).reshape(RANKS, per_rank)
    rank = int(np.argmax((-(-loads // 128) * 128).sum(1) / loads.sum(1)))
    local = np.where(ids // per_rank == rank, ids % per_rank, -1)
    return torch.from_numpy(local[(local >= 0).any(1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, default=TRACE, help="a recorded trace (.npz with expert_ids)")
    args = parser.parse_args()
    routings = {"generated, E 128, K 8": (generated(), 128)}
    if args.trace.exists():
        routings[f"recorded, {args.trace.stem}"] = (recorded(args.trace), 32)
    worst = dict.fromkeys(("unpermute", "pack_payload", "unpack_payload", "replica_reduce", "gemm_flops"), 0.0)

    def show(routing: str, what: str, ratio: float, key: str) -> None:
        print(f"{routing:36} {what:28} {ratio:8.4f}", flush=True)
        worst[key] = max(worst[key], ratio)

    print(f"{'routing':36} {'issued over minimum':28} {'ratio':>8}")
    for name, (ids, experts) in routings.items():
        for hidden_size in (2048, 2880, 7168):
            found = unpermute_bytes(ids, experts, hidden_size) | payload_bytes(ids, experts, hidden_size)
            for key, ratio in found.items():
                show(name, f"{key} bytes, H {hidden_size}", ratio, key)
        for kernel, ratio in gemm_flops(worst_rank(ids, experts), experts // RANKS).items():
            show(name, f"{kernel} FLOPs", ratio, "gemm_flops")
    for what, place in (("one shard each", [0, 5, 9, 12]), ("hot expert", [3, 3, 3, -1])):
        ratio = reduction_bytes((2 * 768, 512), 16, place)
        show("16 experts, 4 shards", f"replica_reduce, {what}", ratio, "replica_reduce")
    columns = {model.name: columns_issued(model, PRODUCTS["H100"]) for model in MODELS}
    for name, found in columns.items():
        for gemm, ratio in found.items():
            if ratio > 1 or gemm == "layer":
                print(f"{name:36} {gemm + ', columns':28} {ratio:8.4f}")
    worst["columns"] = max(found["layer"] for found in columns.values())
    worst["columns_of_one_gemm"] = max(ratio for found in columns.values() for ratio in found.values())
    print(json.dumps({key: round(ratio, 4) for key, ratio in worst.items()}))


if __name__ == "__main__":
    main()
