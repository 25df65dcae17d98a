"""What compiled machine code says about a kernel's speed: the figures of its main loop and of what follows it.

Nothing here is timed. Instructions are counted along the path of one iteration that has all matrix products and the
fewest instructions; what a tile does once besides is its epilogue. Where a kernel has a narrower tile for the last
columns, all is of the wider one. `relibra compile --dump` keeps the texts.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .control_flow import Instruction, Program, read_amdgcn, read_sass

# 16-bit multiply-adds a clock of one SM or compute unit
RATES = {
    "sm_80": 1024, "sm_86": 512, "sm_89": 512, "sm_90": 2048, "sm_100": 4096, "sm_103": 4096, "gfx942": 1024,
    "gfx950": 2048,
}  # fmt: skip
_ALLOCATED = re.compile(r"ttg\.local_alloc\b[^:]*:.*-> !ttg\.memdesc<([\dx]+)x\w+")
_PRODUCT = re.compile(r"(?:warp_group_dot|tc_gen5_mma(?:_scaled)?|tt\.dot) (%[\w#]+), (%[\w#]+)[, ]")
_LOAD = re.compile(r"LDG|(?:buffer|global|flat)_load_")
_STORE = re.compile(r"STG|(?:buffer|global|flat)_store_")
_AMD_WIDTH = re.compile(r"_(?:load|store)_(?:[us]?(byte|short)|dword(?:x(\d))?)")
_AMD_KINDS = ("ds_read_u16", "ds_read", "ds_write", "buffer_load", "global_load", "s_waitcnt")


@dataclass(frozen=True)
class MachineCode:
    """Figures of one compilation; without a loop that multiplies, everything but the accesses is 0.

    Attributes:
        buffers: of each operand of the main loop's product; 1 where it is not pipelined.
        product: the matrix instruction with its shape, and how many there are in an iteration.
        products_in_flight, loads_in_flight: what the loop's waits leave open; None where it waits for neither. Loads
            are batches of cp.async; those of TMA are waited for by barriers.
        instructions, barriers: in an iteration.
        shared_bytes_a_clock: bytes from and to shared memory for a clock of the matrix unit at its full rate.
        epilogue_instructions: outside of the main loop, in a tile. epilogue_share: clocks of issuing them over the
            matrix clocks of a tile; None where the length of the contraction is not known.
        descriptors: made or renewed inside the tile loop.
        accumulators: in tensor memory; with two, a tile is stored by other warps while the next is multiplied.
        is_flat: a tile is stored within the main loop, which by then has issued the next tile's first loads.
        local: loads and stores of spilled registers.
        loads, stores: from global memory, also into shared memory, and to it. wide_stores: of 128 bits.
        narrow_loads: of fewer than 128 bits each but for 32, which is what indices, weights of rows and biases take.
        indices: of 32 bits.
        amd: instructions of an iteration by kind, on AMD.
        digest: of the instructions with their operands: equal for equal code.
    """

    buffers: tuple[int, ...] = ()
    product: str = ""
    products_in_flight: int | None = None
    loads_in_flight: int | None = None
    instructions: int = 0
    barriers: int = 0
    shared_bytes_a_clock: float = 0.0
    matrix_clocks: float = 0.0
    epilogue_instructions: int = 0
    epilogue_share: float | None = None
    descriptors: int = 0
    accumulators: int = 0
    is_flat: bool = False
    local: int = 0
    loads: int = 0
    wide_stores: int = 0
    stores: int = 0
    narrow_loads: int = 0
    indices: int = 0
    amd: Mapping[str, int] | None = None
    digest: str = ""


def read_machine_code(texts: Mapping[str, str], meta: Mapping[str, Any]) -> MachineCode:
    """The figures of one compilation.

    Args:
        texts: `ttgir`, and `sass` or `amdgcn`.
        meta: target, num_warps, BLOCK_M, BLOCK_N and BLOCK_K, dtype_bytes, accumulators (of BLOCK_N columns a tile);
            K, the length of a tile's contraction, or None; persistent, whether a program walks many tiles.
    """
    amd = "amdgcn" in texts
    code = read_amdgcn(texts["amdgcn"]) if amd else read_sass(texts["sass"])
    digest = hashlib.sha256("\n".join(one.text for one in code).encode()).hexdigest()[:16]
    program = Program(code)
    main = program.main_loop()
    if main is None:
        return MachineCode(**_accesses(code), digest=digest)
    step, products = program.path(main)
    whole = program.instructions(program.tile(main)) if meta["persistent"] else code
    narrower = program.tile_loop(main).blocks - program.tile(main)
    of_whole_tiles = program.instructions(set(range(len(program.blocks))) - narrower)
    counts = _counts(step)
    shapes = Counter(_shape(one, texts["ttgir"]) for one in products)
    name = re.match(r"v_mfma|[A-Z]+", products[0].op).group(0)  # type: ignore[union-attr]
    groups = 1 if name.startswith("UTC") else meta["num_warps"] // (4 if "GMMA" in name else 1)
    tile = meta["BLOCK_M"] * meta["BLOCK_N"] * meta["accumulators"]
    multiply_adds = sum(m * n * k * count for (m, n, k), count in shapes.items()) * groups
    rate = RATES[meta["target"]] * 2 / meta["dtype_bytes"]
    clocks = multiply_adds / rate
    steps = multiply_adds / (tile * meta["BLOCK_K"])
    moved = _shared_bytes(code, step, products, texts["ttgir"], groups, steps, meta)
    is_specialised = name.startswith("UTC") and not _stores(whole)  # other warps store
    ending = len(program.largest_loop(_stores)) if is_specialised else len(whole) - len(step)
    tile_clocks = tile * meta["K"] / rate if meta["K"] else None
    return MachineCode(
        buffers=tuple(_buffers(texts["ttgir"])),
        product=" ".join(f"{name} {m}x{n}x{k} x{count}" for (m, n, k), count in shapes.items()),
        products_in_flight=_least(step, r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)"),
        loads_in_flight=_least(step, r"^DEPBAR\.LE SB0, (0x[0-9a-f]+)"),
        instructions=len(step),
        barriers=counts["BAR"] + counts["s_barrier"],
        shared_bytes_a_clock=round(moved / clocks, 1),
        matrix_clocks=clocks / steps,
        epilogue_instructions=ending,
        epilogue_share=round(ending * meta["num_warps"] / 4 / tile_clocks, 3) if tile_clocks else None,
        descriptors=_counts(whole)["UTMACCTL"],
        accumulators=_accumulators(texts["ttgir"]),
        is_flat=not amd and not is_specialised and _stores(program.instructions(main.blocks)),
        amd={kind: sum(one.op.startswith(kind) for one in step) for kind in _AMD_KINDS} if amd else None,
        **_accesses(of_whole_tiles),
        digest=digest,
    )


def _stores(code: list[Instruction]) -> bool:
    """Whether results leave for global memory."""
    return any(one.op.startswith(("STG", "UTMASTG", "UTMAREDG")) for one in code)


def _accumulators(ttgir: str) -> int:
    """How many tiles of sums there are in tensor memory."""
    found = re.findall(r"ttng\.tmem_alloc\b[^:]*:.*-> !ttg\.memdesc<([\dx]+)xf32", ttgir)
    return max((int(shape.split("x")[0]) if shape.count("x") == 2 else 1 for shape in found), default=0)


def _counts(code: list[Instruction]) -> Counter[str]:
    return Counter(one.op.split(".")[0] for one in code)


def _accesses(code: list[Instruction]) -> dict[str, Any]:
    """How wide global memory is read and written, and how often registers are spilled and loaded again."""
    loads, stores = _widths(code, _LOAD), _widths(code, _STORE)
    counts = _counts(code)
    spilled = sum(counts[op] for op in ("LDL", "STL")) + sum(one.op.startswith("scratch_") for one in code)
    return {
        "loads": sum(loads.values()),
        "wide_stores": stores[128],
        "stores": sum(stores.values()),
        "narrow_loads": sum(count for width, count in loads.items() if width not in (32, 128)),
        "indices": loads[32],
        "local": spilled,
    }


def _widths(code: list[Instruction], kind: re.Pattern[str]) -> Counter[int]:
    """Bits that a thread moves -> how many instructions of `kind` move as many."""
    return Counter(_width(one.op) for one in code if kind.match(one.op))


def _width(op: str) -> int:
    amd = _AMD_WIDTH.search(op)
    if amd:
        return {"byte": 8, "short": 16}.get(amd.group(1)) or 32 * int(amd.group(2) or 1)
    found = re.search(r"\.(?:[US](8|16)|(64|128))(?![\dB])", op)
    return int(found.group(1) or found.group(2)) if found else 32


def _least(code: list[Instruction], pattern: str) -> int | None:
    """The smallest count that one of the waits leaves open."""
    return min((int(m.group(1), 0) for one in code if (m := re.search(pattern, one.text))), default=None)


def _buffers(ttgir: str) -> list[int]:
    """How many buffers in shared memory each operand of the main loop's product has."""
    made: dict[str, str] = {}
    best: list[int] = []
    partition_values: list[str] = []

    def follow(name: str, steps: int = 0) -> int:
        line = made.get(name.split("#")[0])
        if line is None or steps > 40:
            return 0
        if "ttg.local_alloc" in line:
            shape = _ALLOCATED.search(line)
            filled = re.search(r"local_alloc (%[\w#]+)", line)  # a tensor put there for one product
            return 1 if filled or shape is None else int(shape.group(1).split("x")[0])
        if line.startswith("="):
            return follow(line[1:], steps + 1)
        found = re.search(r"(?:local_load|memdesc_\w+|convert_layout|fp_to_fp|\w+\.\w+) (%[\w#]+)", line)
        return follow(found.group(1), steps + 1) if found else 0

    for line in ttgir.splitlines():
        text = line.strip()
        if text.startswith(("partition", "default")):
            names = re.findall(r"(%\w+): ", text)
            made.update({name: "=" + value for name, value in zip(names, partition_values, strict=False)})
        if "ttg.warp_specialize(" in text:
            partition_values = re.findall(r"%[\w#]+", text.split("(", 1)[1].split(")")[0])
        for name, value in re.findall(r"(%\w+) = (%[\w#]+)[,)]", text):  # loop arguments
            made[name] = "=" + value
        found = re.match(r"^(%\w+)(?::\d+)? = (.*)$", text)
        if found and "iter_args" not in text:
            made[found.group(1)] = found.group(2)
        product = _PRODUCT.search(text)
        if product:  # those outside of the main loop are not pipelined
            best = max(best, [follow(product.group(1)), follow(product.group(2))], key=sum)
    return best


def _shape(one: Instruction, ttgir: str) -> tuple[int, int, int]:
    """Rows, columns and contraction of one matrix instruction."""
    if one.op.startswith("UTC"):  # its size is in a register; the IR has it, of the widest tile at last
        tiles = re.findall(r"tc_gen5_mma .*?!ttg\.memdesc<(?:\d+x)?(\d+)x(\d+)x\w+, #\w+, #ttng\.tensor_memory", ttgir)
        return max(((int(m), int(n), 16) for m, n in tiles), default=(0, 0, 0))
    found = re.search(r"(\d+)x(\d+)x(\d+)", one.op) or re.match(r"[HI]MMA\.(16)(8)(\d+)", one.op)
    return (int(found.group(1)), int(found.group(2)), int(found.group(3))) if found else (0, 0, 0)


def _shared_bytes(
    code: list[Instruction],
    step: list[Instruction],
    products: list[Instruction],
    ttgir: str,
    groups: int,
    steps: float,
    meta: Mapping[str, Any],
) -> float:
    """Bytes that an iteration moves from and to shared memory: by warps, by the matrix unit and by copies into it."""
    lanes = 64 if str(meta["target"]).startswith("gfx") else 32
    size = meta["dtype_bytes"]
    moved = float(sum(_local_bytes(one, lanes) for one in step) * meta["num_warps"])
    for one in products:
        if "GMMA" in one.op or one.op.startswith("UTC"):
            m, n, k = _shape(one, ttgir)
            left_in_registers = "GMMA" in one.op and re.search(r"R\d+, R\d+, gdesc", one.text)
            moved += ((0 if left_in_registers else m) + n) * k * size * groups
    if any(one.op.startswith(("UTMALDG", "LDGSTS")) or one.op.endswith("lds") for one in code):
        moved += (meta["BLOCK_M"] + meta["BLOCK_N"] * meta["accumulators"]) * meta["BLOCK_K"] * size * steps
    return moved


def _local_bytes(one: Instruction, lanes: int) -> int:
    """Bytes that one warp's instruction moves between registers and shared memory."""
    op = one.op
    if op.startswith(("LDSM", "STSM")):
        tiles = re.search(r"\.(\d)$", op)
        return 128 * int(tiles.group(1) if tiles else 1)
    if re.match(r"(LDS|STS)\b", op):
        wide, narrow = re.search(r"\.(128|64)\b", op), re.search(r"\.[US](16|8)\b", op)
        found = wide or narrow
        return lanes * (int(found.group(1)) if found else 32) // 8
    found = re.match(r"ds_(?:read|write)(2)?\w*_[bui](\d+)$", op)
    return lanes * int(found.group(2)) // 8 * (2 if found.group(1) else 1) if found else 0
