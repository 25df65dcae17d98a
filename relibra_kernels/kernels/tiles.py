# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""What the grouped GEMM kernels share: which tile a program computes, where its weight is, and the contraction loop."""

import triton
import triton.language as tl


@triton.jit
def first_program(XCDS: tl.constexpr):
    """This program's place in the order of tiles: neighbours share an L2 cache also where chiplets have their own."""
    program = tl.program_id(0)
    if XCDS > 1:  # blocks are dealt to the chiplets in turn, and their number is a multiple of XCDS
        program = (program % XCDS) * (tl.num_programs(0) // XCDS) + program // XCDS
    return program


@triton.jit
def tile_of(index, num_m, NUM_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row tile, column tile) number `index`: GROUP_M row tiles go through all columns together."""
    per_group = GROUP_M * NUM_N
    first_m = index // per_group * GROUP_M
    height = tl.minimum(num_m - first_m, GROUP_M)
    inner = index % per_group
    return first_m + inner % height, inner // height


@triton.jit
def weight_of(slot, weight_of_slot_ptr):
    if weight_of_slot_ptr is not None:
        return tl.load(weight_of_slot_ptr + slot)
    else:
        return slot


@triton.jit
def stored(home_ptr, replica_ptr, weight, num_home, SIZE: tl.constexpr):
    """Where tensor number `weight` of the two stores begins."""
    at = home_ptr + weight.to(tl.int64) * SIZE
    if replica_ptr is not None:
        at = tl.where(weight < num_home, at, replica_ptr + (weight - num_home).to(tl.int64) * SIZE)
    return at


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b in fp32. UPCAST is for the interpreter, whose bf16 products are wrong."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def describe_rows(ptr, num_rows, D: tl.constexpr, A_MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Descriptor of contiguous rows, or of rows picked by index; the pointer itself where there is no such hardware."""
    if A_MODE == "tma":
        return tl.make_tensor_descriptor(ptr, [num_rows, D], [D, 1], [BLOCK_M, BLOCK_K])
    elif A_MODE == "gather":
        return tl.make_tensor_descriptor(ptr, [num_rows, D], [D, 1], [1, BLOCK_K])
    else:
        return ptr


@triton.jit
def describe_weights(
    ptr,
    count,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS_ARE_N: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Descriptor of a store of weights `[count, N, D]` (ROWS_ARE_N) or `[count, D, N]`, or the pointer itself."""
    if not TMA or ptr is None:
        return ptr
    elif ROWS_ARE_N:
        return tl.make_tensor_descriptor(ptr, [count, N, D], [N * D, D, 1], [1, BLOCK_N, BLOCK_K])
    else:
        return tl.make_tensor_descriptor(ptr, [count, D, N], [N * D, N, 1], [1, BLOCK_K, BLOCK_N])


@triton.jit
def weight_store(
    home,
    replica_ptr,
    at,
    weight,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS_ARE_N: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(what `load_weight` takes, the weight's number in it).

    With one store its descriptor serves every tile. With two, a tile makes its own for the one weight at `at`:
    two loops over two descriptors would need the shared memory of both.
    """
    if TMA and replica_ptr is None:
        return home, weight
    else:
        return describe_weights(at, 1, N, D, ROWS_ARE_N, TMA, BLOCK_N, BLOCK_K), 0


@triton.jit
def load_rows(rows_of, row0, row_R, k0, D: tl.constexpr, A_MODE: tl.constexpr, BLOCK_K: tl.constexpr):
    """`[BLOCK_M, BLOCK_K]` of A. Rows past the slot's end are read from elsewhere: they are never stored."""
    if A_MODE == "tma":
        return rows_of.load([row0, k0])
    elif A_MODE == "gather":
        return rows_of.gather(row_R, k0)
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        at = rows_of + row_R[:, None].to(tl.int64) * D + k[None, :]
        if D % BLOCK_K == 0:
            return tl.load(at)
        else:
            return tl.load(at, mask=k[None, :] < D, other=0.0)


@triton.jit
def load_weight(
    weights,
    weight,
    n0,
    k0,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS_ARE_N: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`[BLOCK_K, BLOCK_N]` of one weight: number `weight` of a descriptor's store, or at the pointer `weights`.

    Columns past N are read from elsewhere: they are never stored. Past D there are zeros.
    """
    if TMA:
        if ROWS_ARE_N:
            return weights.load([weight, n0, k0]).reshape(BLOCK_N, BLOCK_K).T
        else:
            return weights.load([weight, k0, n0]).reshape(BLOCK_K, BLOCK_N)
    else:
        n = (n0 + tl.arange(0, BLOCK_N)) % N
        k = k0 + tl.arange(0, BLOCK_K)
        if ROWS_ARE_N:
            at = weights + n[None, :].to(tl.int64) * D + k[:, None]
        else:
            at = weights + k[:, None].to(tl.int64) * N + n[None, :]
        if D % BLOCK_K == 0:
            return tl.load(at)
        else:
            return tl.load(at, mask=k[:, None] < D, other=0.0)


@triton.jit
def contract(
    rows_of,
    row0,
    row_R,
    weights,
    weight,
    n0,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS_ARE_N: tl.constexpr,
    A_MODE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One fp32 tile `[BLOCK_M, BLOCK_N]` of rows @ weight."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k0 in range(0, D, BLOCK_K):
        a = load_rows(rows_of, row0, row_R, k0, D, A_MODE, BLOCK_K)
        b = load_weight(weights, weight, n0, k0, N, D, ROWS_ARE_N, TMA, BLOCK_N, BLOCK_K)
        acc = dot(a, b, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def contract_two(
    rows_of,
    row0,
    row_R,
    weights,
    weight,
    n0,
    n1,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS_ARE_N: tl.constexpr,
    A_MODE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Two tiles of the same rows, at columns n0 and n1."""
    acc0 = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k0 in range(0, D, BLOCK_K):
        a = load_rows(rows_of, row0, row_R, k0, D, A_MODE, BLOCK_K)
        b0 = load_weight(weights, weight, n0, k0, N, D, ROWS_ARE_N, TMA, BLOCK_N, BLOCK_K)
        acc0 = dot(a, b0, acc0, PRECISION, UPCAST)
        b1 = load_weight(weights, weight, n1, k0, N, D, ROWS_ARE_N, TMA, BLOCK_N, BLOCK_K)
        acc1 = dot(a, b1, acc1, PRECISION, UPCAST)
    return acc0, acc1
