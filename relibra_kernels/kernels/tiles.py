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
def count_tiles(slot_offsets_ptr, num_slots, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """How many tiles of rows there are before the padding."""
    slot = tl.arange(0, SLOTS)
    real = slot < num_slots
    rows = tl.load(slot_offsets_ptr + slot + 1, mask=real, other=0) - tl.load(
        slot_offsets_ptr + slot, mask=real, other=0
    )
    return tl.sum((rows + BLOCK_M - 1) // BLOCK_M, 0)


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
def bias_row(home_ptr, replica_ptr, weight, num_home, column, inside, SIZE: tl.constexpr, XCDS: tl.constexpr):
    """[1, columns] fp32 of bias number `weight` of the two stores, each `SIZE` long.

    On AMD a load of each store: Triton 3.6 fails on a choice between their pointers for gfx942.
    """
    if replica_ptr is None or XCDS == 1:
        at = stored(home_ptr, replica_ptr, weight, num_home, SIZE)
        return tl.load(at + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    else:
        is_home = weight < num_home
        home_at = home_ptr + weight.to(tl.int64) * SIZE + column
        replica_at = replica_ptr + (weight - num_home).to(tl.int64) * SIZE + column
        row = tl.load(home_at, mask=inside & is_home, other=0.0).to(tl.float32)
        return (row + tl.load(replica_at, mask=inside & ~is_home, other=0.0).to(tl.float32))[None, :]


@triton.jit
def index_of(weight, num_home, home_first, replica_first):
    """Number of a weight in the store that holds homes and replicas (`stores.two_stores`)."""
    return tl.where(weight < num_home, weight + home_first, weight - num_home + replica_first)


@triton.jit
def slots_of(weight, num_slots, weight_of_slot_ptr, SLOTS: tl.constexpr):
    """(first, end) of the slots that can be of `weight`. Where a table names them, some between may be of others."""
    if weight_of_slot_ptr is None:
        return weight, tl.minimum(weight + 1, num_slots)
    else:
        slot = tl.arange(0, SLOTS)
        mine = tl.load(weight_of_slot_ptr + slot, mask=slot < num_slots, other=-1) == weight
        first = tl.min(tl.where(mine, slot, num_slots), 0)
        return first, tl.max(tl.where(mine, slot + 1, 0), 0)


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
    PAIRS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Descriptor of a store of weights `[count, N, D]` (ROWS_ARE_N) or `[count, D, N]`, or the pointer itself.

    PAIRS: there are 2N columns, and a block has BLOCK_N of the first half and those of the second that go with them.
    """
    if not TMA:
        return ptr
    elif PAIRS and ROWS_ARE_N:
        shape = [count, 2, N, D]
        return tl.make_tensor_descriptor(ptr, shape, [2 * N * D, N * D, D, 1], [1, 2, BLOCK_N, BLOCK_K])
    elif PAIRS:
        shape = [count, D, 2, N]
        return tl.make_tensor_descriptor(ptr, shape, [2 * N * D, 2 * N, N, 1], [1, BLOCK_K, 2, BLOCK_N])
    elif ROWS_ARE_N:
        return tl.make_tensor_descriptor(ptr, [count, N, D], [N * D, D, 1], [1, BLOCK_N, BLOCK_K])
    else:
        return tl.make_tensor_descriptor(ptr, [count, D, N], [N * D, N, 1], [1, BLOCK_K, BLOCK_N])


@triton.jit
def weight_store(
    described,
    base_ptr,
    other_ptr,
    weight,
    num_home,
    home_first,
    replica_first,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS_ARE_N: tl.constexpr,
    PAIRS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(what `load_weight` takes, the weight's number in it).

    Stores that cannot be numbered together make a descriptor for every tile, of its one weight: two loops over two
    descriptors would need the shared memory of both.
    """
    number = index_of(weight, num_home, home_first, replica_first)
    SIZE: tl.constexpr = N * D * (2 if PAIRS else 1)
    if other_ptr is None:
        if TMA:
            return described, number
        else:
            return base_ptr + number.to(tl.int64) * SIZE, 0
    else:
        at = stored(base_ptr, other_ptr, weight, num_home, SIZE)
        return describe_weights(at, 1, N, D, ROWS_ARE_N, PAIRS, TMA, BLOCK_N, BLOCK_K), 0


@triton.jit
def load_rows(rows_of, row0, row_R, k0, D: tl.constexpr, A_MODE: tl.constexpr, BLOCK_K: tl.constexpr):
    """`[BLOCK_M, BLOCK_K]` of A. Rows past the slot's end are read from elsewhere: they are never stored.

    A_MODE: "tma", "gather" (a descriptor's), "pointer", or "pointer32" where all offsets fit 32 bits.
    """
    if A_MODE == "tma":
        return rows_of.load([row0, k0])
    elif A_MODE == "gather":
        return rows_of.gather(row_R, k0)
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        row = row_R[:, None]
        if A_MODE == "pointer":
            row = row.to(tl.int64)
        at = rows_of + (row * D + k[None, :])
        if D % BLOCK_K == 0:
            return tl.load(at)
        else:
            return tl.load(at, mask=k[None, :] < D, other=0.0)


@triton.jit
def load_weight(
    weights,
    number,
    n0,
    k0,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS_ARE_N: tl.constexpr,
    PAIRS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`[BLOCK_K, BLOCK_N]` of one weight, twice as wide with PAIRS: `number` of a descriptor's, or at a pointer.

    Columns past N are zeros or read from elsewhere: they are never stored. Past D there are zeros.
    """
    WIDE: tl.constexpr = BLOCK_N * (2 if PAIRS else 1)
    if TMA:
        if PAIRS and ROWS_ARE_N:
            return weights.load([number, 0, n0, k0]).reshape(WIDE, BLOCK_K).T
        elif PAIRS:
            return weights.load([number, k0, 0, n0]).reshape(BLOCK_K, WIDE)
        elif ROWS_ARE_N:
            return weights.load([number, n0, k0]).reshape(BLOCK_N, BLOCK_K).T
        else:
            return weights.load([number, k0, n0]).reshape(BLOCK_K, BLOCK_N)
    else:
        lane = tl.arange(0, WIDE)
        n = (n0 + lane % BLOCK_N) % N
        if PAIRS:
            n += lane // BLOCK_N * N
        k = k0 + tl.arange(0, BLOCK_K)
        WIDTH: tl.constexpr = N * (2 if PAIRS else 1)
        if WIDTH * D >= 2**29:  # AMD's offsets are in bytes
            n, k = n.to(tl.int64), k.to(tl.int64)
        at = weights + (n[None, :] * D + k[:, None] if ROWS_ARE_N else k[:, None] * WIDTH + n[None, :])
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
    number,
    n0,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS_ARE_N: tl.constexpr,
    PAIRS: tl.constexpr,
    A_MODE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One fp32 tile `[BLOCK_M, BLOCK_N]` of rows @ weight, twice as wide with PAIRS."""
    if A_MODE == "pointer32":  # what AMD's compiler has to know for buffer loads from a store of 2 GiB and more
        tl.assume(n0 >= 0)
        tl.assume(n0 < N)
    acc = tl.zeros([BLOCK_M, BLOCK_N * (2 if PAIRS else 1)], dtype=tl.float32)
    for k0 in range(0, D, BLOCK_K):
        a = load_rows(rows_of, row0, row_R, k0, D, A_MODE, BLOCK_K)
        b = load_weight(weights, number, n0, k0, N, D, ROWS_ARE_N, PAIRS, TMA, BLOCK_N, BLOCK_K)
        acc = dot(a, b, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def store_tile(
    tile,
    at,
    n0,
    stored_R,
    N: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The stored rows of a tile into rows of N columns at `at`, from column `n0` on; HALVES: one after the other."""
    if HALVES:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tile.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        store_tile(left, at, n0, stored_R, N, False, BLOCK_M, HALF)
        store_tile(right, at, n0 + HALF, stored_R, N, False, BLOCK_M, HALF)
    else:
        column = n0 + tl.arange(0, BLOCK_N)
        element = at + (tl.arange(0, BLOCK_M)[:, None] * N + column[None, :])
        tl.store(element, tile.to(at.dtype.element_ty), mask=stored_R[:, None] & (column < N)[None, :])
