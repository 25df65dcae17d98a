"""The control flow of compiled GPU code: basic blocks, natural loops, and the way through one iteration.

The main loop is the innermost loop that multiplies matrices. Loops are found with dominators, so that blocks out of
line, which wait for a barrier and branch back, do not look like loops.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

MMA = re.compile(r"^(?:[HQIDO]GMMA|UTC[A-Z]*MMA|[HIDQ]MMA|v_mfma_)")
NVIDIA_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\*")
LABEL = re.compile(r"^(\.?LBB\d+_\d+):")


@dataclass
class Instruction:
    """One machine instruction; `op` with its modifiers, `text` with its operands."""

    op: str
    text: str
    target: int | None = None  # where a branch goes
    falls: bool = True  # whether the next instruction may follow


@dataclass
class Loop:
    """A natural loop: the block that every iteration starts with, and all of its blocks."""

    header: int
    blocks: set[int] = field(default_factory=set)


def read_sass(text: str) -> list[Instruction]:
    """Instructions of `cuobjdump -sass`."""
    found = [NVIDIA_LINE.match(line) for line in text.splitlines()]
    pairs = [(int(m.group(1), 16), m.group(2)) for m in found if m]
    index = {address: i for i, (address, _) in enumerate(pairs)}
    out, rejoin = [], {}
    for _, line in pairs:
        guarded = line.startswith("@")
        body = re.sub(r"^@!?U?P\w+\s+", "", line)
        op = body.split()[0]
        to = re.search(r"(0x[0-9a-f]+)$", body)
        place = index.get(int(to.group(1), 16)) if to else None
        one = Instruction(op, body)
        if op.startswith("BSSY"):
            rejoin[body.split()[1].rstrip(",")] = place
        elif op.startswith("BSYNC"):
            one.target = rejoin.get(body.split()[1])
        elif op.startswith(("BRA", "JMP")):
            one.target = place
            one.falls = guarded or not re.match(r"\S+ 0x", body)
        elif op.startswith(("EXIT", "RET", "BRX", "JMX", "KILL")):
            one.falls = guarded
        out.append(one)
    return out


def read_amdgcn(text: str) -> list[Instruction]:
    """Instructions of AMD assembly."""
    out: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = LABEL.match(line)
        if label:
            labels[label.group(1)] = len(out)
        found = re.match(r"^\s+([sv]_\w+|ds_\w+|buffer_\w+|global_\w+|flat_\w+|scratch_\w+)\b(.*)", line)
        if found:
            out.append(Instruction(found.group(1), line.split(";")[0].strip()))
    for one in out:
        if "branch" in one.op:
            one.target = labels.get(one.text.split()[-1])
            one.falls = one.op != "s_branch"
        elif one.op in ("s_endpgm", "s_setpc_b64"):
            one.falls = False
    return out


class Program:
    """Basic blocks, dominators and natural loops of one function."""

    def __init__(self, code: list[Instruction]):
        self.code = code
        starts = {0}
        for i, one in enumerate(code):
            if one.target is not None:
                starts.add(one.target)
            if one.target is not None or not one.falls:
                starts.add(i + 1)
        bounds = sorted(s for s in starts if s < len(code))
        self.blocks = [range(a, b) for a, b in zip(bounds, [*bounds[1:], len(code)], strict=True)]
        of = {block.start: i for i, block in enumerate(self.blocks)}
        self.next: list[list[int]] = [[] for _ in self.blocks]
        self._before: list[list[int]] = [[] for _ in self.blocks]
        for i, block in enumerate(self.blocks):
            last = code[block[-1]]
            if last.target in of:
                self.next[i].append(of[last.target])
            if last.falls and i + 1 < len(self.blocks) and i + 1 not in self.next[i]:
                self.next[i].append(i + 1)
            for j in self.next[i]:
                self._before[j].append(i)
        self.dominators = self._dominators()
        self.loops = self._loops()

    def _dominators(self) -> list[int]:
        """Of each block, as bits: the blocks that every way to it goes through, itself included."""
        roots, everything = self._roots(), (1 << len(self.blocks)) - 1
        found = [1 << i if i in roots else everything for i in range(len(self.blocks))]
        changed = True
        while changed:
            changed = False
            for i in set(range(len(self.blocks))) - roots:
                both = everything
                for j in self._before[i]:
                    both &= found[j]
                both |= 1 << i
                changed |= both != found[i]
                found[i] = both
        return found

    def _loops(self) -> list[Loop]:
        """The natural loops: one for each block that is branched back to."""
        loops: dict[int, Loop] = {}
        for i, after in enumerate(self.next):
            for j in after:
                if not self.is_back(i, j):
                    continue
                loop = loops.setdefault(j, Loop(j, {j}))
                todo = [i]
                while todo:
                    block = todo.pop()
                    if block not in loop.blocks:
                        loop.blocks.add(block)
                        todo += self._before[block]
        return list(loops.values())

    def _roots(self) -> set[int]:
        """The entry, and the first block of every part that is only reached by an indirect branch."""
        roots, seen = set(), set()
        for i in range(len(self.blocks)):
            if i not in seen:
                roots.add(i)
                todo = [i]
                while todo:
                    j = todo.pop()
                    if j not in seen:
                        seen.add(j)
                        todo += self.next[j]
        return roots

    def is_back(self, source: int, target: int) -> bool:
        """Whether the edge closes a loop."""
        return bool(self.dominators[source] >> target & 1)

    def products(self, block: int) -> int:
        """Matrix products in a block."""
        return sum(bool(MMA.match(self.code[i].op)) for i in self.blocks[block])

    def main_loop(self) -> Loop | None:
        """The innermost loop with most products; where tiles of two widths have as many, that of the longer code."""
        with_products = [loop for loop in self.loops if any(map(self.products, loop.blocks))]
        innermost = [a for a in with_products if not any(b.blocks < a.blocks for b in with_products)]

        def size(loop: Loop) -> tuple[int, int]:
            return len(self.path(loop)[1]), len(self.instructions(self.tile(loop)))

        return max(innermost, key=size, default=None)

    def tile_loop(self, main: Loop) -> Loop:
        """The largest loop around it."""
        return max((loop for loop in self.loops if loop.blocks >= main.blocks), key=lambda loop: len(loop.blocks))

    def tile(self, main: Loop) -> set[int]:
        """The blocks of the tile loop that an iteration through `main` can reach; not those of narrower tiles."""
        outer = self.tile_loop(main)

        def reached(edges: list[list[int]], ends: set[int]) -> set[int]:
            """Blocks from the main loop along `edges`, none beyond `ends`."""
            seen, todo = set(main.blocks), list(main.blocks)
            while todo:
                block = todo.pop()
                new = outer.blocks.intersection(edges[block]) - seen if block not in ends else set()
                seen |= new
                todo += new
            return seen

        last = {i for i in outer.blocks if outer.header in self.next[i]}
        return reached(self.next, last) | reached(self._before, {outer.header})

    def largest_loop(self, accepts: Callable[[list[Instruction]], bool]) -> list[Instruction]:
        """The instructions of the loop with the most of them of all that `accepts`."""
        return max(filter(accepts, (self.instructions(loop.blocks) for loop in self.loops)), key=len, default=[])

    def _in_postorder(self, loop: Loop) -> list[int]:
        """The blocks of one iteration, each after all that follow it."""
        order: list[int] = []
        seen = {loop.header}
        stack = [(loop.header, iter(self.next[loop.header]))]
        while stack:
            here, rest = stack[-1]
            for j in rest:
                if j in loop.blocks and j not in seen and not self.is_back(here, j):
                    seen.add(j)
                    stack.append((j, iter(self.next[j])))
                    break
            else:
                order.append(here)
                stack.pop()
        return order

    def path(self, loop: Loop) -> tuple[list[Instruction], list[Instruction]]:
        """(instructions, products among them) of one iteration: all products, fewest instructions."""
        best: dict[int, tuple[tuple[int, int], int | None]] = {}
        for block in reversed(self._in_postorder(loop)):
            gain = (self.products(block), -len(self.blocks[block]))
            if block == loop.header:
                best[block] = (gain, None)
                continue
            came = [
                (best[j][0], j)
                for j in loop.blocks
                if j in best and block in self.next[j] and not self.is_back(j, block)
            ]
            if came:
                score, j = max(came)
                best[block] = ((score[0] + gain[0], score[1] + gain[1]), j)
        ends = [(best[j][0], j) for j in best if loop.header in self.next[j]]
        walk: list[int] = []
        at: int | None = max(ends)[1] if ends else loop.header
        while at is not None:
            walk.append(at)
            at = best[at][1]
        code = [self.code[i] for block in reversed(walk) for i in self.blocks[block]]
        return code, [one for one in code if MMA.match(one.op)]

    def instructions(self, blocks: set[int]) -> list[Instruction]:
        """All instructions of some blocks."""
        return [self.code[i] for block in sorted(blocks) for i in self.blocks[block]]
