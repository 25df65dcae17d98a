"""The rooms of the house: what each is for and which others it may import. The one table of it.

`tests/test_imports.py` holds the files to the table, and `python tests/support/house.py` draws it in CONTRIBUTING.md.
"""

import ast
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULE_NAME = re.compile(r"relibra_kernels(\.[a-z_]\w*)+")
PICTURE = re.compile(r"(?<=<!-- rooms -->\n\n).*?(?=\n\n<!-- end of rooms -->)", re.DOTALL)


@dataclass(frozen=True)
class Room:
    """A part of the product: files, or packages with all that is in them but the rooms of their own."""

    name: str
    purpose: str
    uses: str = ""  # the rooms that its files may import, each below this one
    files: str = ""  # module names under relibra_kernels; empty: the room's own name


PLANNER = "planner simulation planning formats solver options pricing plan files errors"
PARALLEL = "parallel parallel.tokens parallel.experts parallel.session parallel.comm"
BASE = "payload operands schedule weights form"  # what tensors of a layer look like

# From the top down. A room may import only rooms below it, and of them only those that it names.
ROOMS = (
    Room(
        "cli",
        "the commands, one file each",
        f"integrations warmup parallel nn ops tuning compiling configs form progress {PLANNER}",
        "cli __main__",
    ),
    Room(
        "integrations",
        "Hugging Face, Megatron, verl, slime",
        f"{PARALLEL} nn router compiled autograd ops reference {BASE} alignment forwards {PLANNER}",
    ),
    Room(
        "warmup",
        "compile before the first step",
        f"parallel parallel.experts nn autograd ops compiling kernels configs {BASE} errors",
        "precompile",
    ),
    Room(
        "parallel",
        "what a user drives",
        f"parallel.tokens parallel.experts parallel.session parallel.comm nn {BASE} alignment {PLANNER}",
    ),
    Room(
        "parallel.tokens",
        "a routed token's way",
        f"parallel.experts parallel.session parallel.comm nn autograd ops {BASE} planner plan errors",
    ),
    Room("parallel.experts", "an expert's way", f"parallel.comm nn ops frameworks {BASE} planner plan errors"),
    Room("parallel.session", "options, what a forward is bound to", "parallel.comm alignment forwards errors"),
    Room("parallel.comm", "collectives, groups, watchdog", "planner errors"),
    Room("nn", "the layer as modules", f"router compiled autograd ops {BASE} errors"),
    Room("router", "top-k routers, replay and recording", "errors"),
    Room("compiled", "the MoE MLP for torch.compile", f"autograd ops {BASE}"),
    Room("autograd", "the MoE MLP, forward and backward", f"ops {BASE} errors", "autograd slot_products"),
    Room("ops", "which backend computes", "kernels reference errors"),
    Room("tuning", "the search for configs, offline", f"compiling kernels configs {BASE} progress {PLANNER}"),
    Room("compiling", "compile without a GPU", "kernels configs progress errors"),
    Room("kernels", "one family of Triton kernels a file", f"reference configs {BASE} errors"),
    Room("reference", "the same functions in plain torch", f"{BASE} errors"),
    Room("configs", "what a launch asks", "pricing files errors"),
    Room("payload", "what a token takes to another rank", "operands schedule errors"),
    Room("operands", "checks of what an operation gets", "schedule weights form errors"),
    Room("schedule", "which rows each slot computes", "errors"),
    Room("weights", "the experts' tensors, their gradients", "errors"),
    Room("form", "activation, bias, layout of an expert", "errors"),
    Room("alignment", "whether a record is of these tokens", "errors"),
    Room("forwards", "which forward runs or is recomputed"),
    Room("frameworks", "who takes over another framework's layers"),
    Room("progress", "a line that says how far it is"),
    Room("planner", "what users import of the planner", PLANNER.removeprefix("planner ")),
    Room(
        "simulation", "policies in modelled time", "planning solver options pricing plan errors", "planner.simulation"
    ),
    Room("planning", "from loads to a plan", "solver options pricing plan errors", "planner.planning"),
    Room("formats", "one loader an engine", "plan files errors", "planner.formats"),
    Room("solver", "placement, replicas, the exact split", "options pricing plan errors", "planner.solver"),
    Room("options", "what a plan is to achieve", "pricing errors", "planner.options"),
    Room("pricing", "what a plan costs", "plan errors", "planner.pricing"),
    Room(
        "plan",
        "traces, loads, plans, splits",
        "files errors",
        "planner.plan planner.plan_rules planner.splits planner.transfers planner.loads planner.cluster "
        "planner.trace planner.trace_rules planner.trace_report planner.trace_files planner.trace_writer "
        "planner.printing planner.plots",
    ),
    Room("files", "files written whole or not at all", "errors", "planner.files planner.npz_rows"),
    Room("errors", "the errors of all rooms", "", "planner.errors"),
)


def room_of(module: str, rooms: Iterable[Room] = ROOMS) -> str:
    """The room of a module: its own, or that of the nearest package it is in. Raises: KeyError where there is none."""
    names = {name: room.name for room in rooms for name in (room.files or room.name).split()}
    inner = module
    while inner not in names or (inner == "planner" and module != "planner"):  # a new file of the planner is in no room
        inner, dot, _ = inner.rpartition(".")
        if not dot:
            raise KeyError(module)
    return names[inner]


def source_files() -> dict[str, str]:
    """Module name under relibra_kernels -> its source; without `relibra_kernels` itself, which imports on first use."""
    sources = {}
    for folder, prefix in ((ROOT / "relibra_kernels", ()), (ROOT / "planner", ("planner",))):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if prefix or parts[0] != "planner":  # a symlink to the other folder; rglob follows it in some Pythons
                name = ".".join((*prefix, *parts)).removesuffix("__init__").rstrip(".")
                if name:
                    sources[name] = path.read_text()
    return sources


def imports(module: str, sources: Mapping[str, str]) -> Iterator[str]:
    """What a module imports of the product, in functions too; what only type checkers read is left out.

    A text that is the name of a module counts as an import of it: `importlib` and `python -m` get modules so.
    """
    is_package = any(other.startswith(f"{module}.") for other in sources)
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in _import_statements(sources[module]):
        if isinstance(node, ast.Constant):
            names = [_absolute(str(node.value), package)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            base = node.module.split(".") if node.module else []
            if node.level:
                base = ["relibra_kernels", *package[: len(package) - node.level + 1], *base]
            names = [".".join((*base, alias.name)) for alias in node.names]
        for name in names:
            top, _, inner = name.partition(".")
            if top != "relibra_kernels":
                continue
            while inner and inner not in sources:  # the last part may be a name of a module
                inner = inner.rpartition(".")[0]
            if inner:
                yield inner


def _absolute(name: str, package: list[str]) -> str:
    """`..a.b` as `import_module` reads it within a package."""
    inner = name.lstrip(".")
    dots = len(name) - len(inner)
    return ".".join(["relibra_kernels", *package[: len(package) - dots + 1], inner]) if dots else name


@functools.cache
def _import_statements(source: str) -> tuple[ast.Import | ast.ImportFrom | ast.Constant, ...]:
    """The statements, and the texts that are the whole name of a module or are given to `import_module`."""
    found: list[ast.Import | ast.ImportFrom | ast.Constant] = []
    for node in _executed(ast.parse(source)):
        is_name = isinstance(node, ast.Constant) and MODULE_NAME.fullmatch(str(node.value))
        if isinstance(node, ast.Import | ast.ImportFrom) or is_name:
            found.append(node)
        elif isinstance(node, ast.Call) and _gets_a_module(node) and isinstance(node.args[0], ast.Constant):
            found.append(node.args[0])
    return tuple(found)


def _gets_a_module(call: ast.Call) -> bool:
    return ast.unparse(call.func).split(".")[-1] in ("import_module", "__import__")


def computed_imports(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Module -> what it passes to `import_module` or `__import__` that is not written out there."""
    found: dict[str, list[str]] = {}
    for module, source in sources.items():
        calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
        for call in calls:
            if _gets_a_module(call) and not isinstance(call.args[0], ast.Constant):
                found.setdefault(module, []).append(ast.unparse(call.args[0]))
    return found


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from _executed(other)
            continue
        yield node
        yield from _executed(node)


def faults(sources: Mapping[str, str], rooms: Iterable[Room] = ROOMS) -> list[str]:
    """Every import that the table does not allow, and every file that is in no room."""
    rooms = tuple(rooms)
    uses = {room.name: room.uses.split() for room in rooms}
    found = []
    for module in sources:
        try:
            room = room_of(module, rooms)
        except KeyError:
            found.append(f"{module} is in no room: name it in tests/support/house.py")
            continue
        for imported in sorted(set(imports(module, sources))):
            try:
                other = room_of(imported, rooms)
            except KeyError:
                continue  # reported as a module
            if other != room and other not in uses[room]:
                found.append(f"{module} imports {imported}: {room} may not use {other}")
    return found


def cycles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The groups of two or more nodes that lead to each other."""
    reached = {node: _reachable(node, graph) for node in graph}
    groups = {tuple(sorted({node, *(n for n in reached[node] if node in reached.get(n, ()))})) for node in graph}
    return sorted(list(group) for group in groups if len(group) > 1)


def _reachable(start: str, graph: Mapping[str, Iterable[str]]) -> set[str]:
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        for node in graph.get(ahead.pop(), ()):
            if node not in seen:
                seen.add(node)
                ahead.append(node)
    return seen


def file_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    return {module: set(imports(module, sources)) - {module} for module in sources}


def room_graph(sources: Mapping[str, str], rooms: Iterable[Room] = ROOMS) -> dict[str, set[str]]:
    rooms = tuple(rooms)
    graph: dict[str, set[str]] = {room.name: set() for room in rooms}
    for module, others in file_graph(sources).items():
        graph[room_of(module, rooms)] |= {room_of(other, rooms) for other in others} - {room_of(module, rooms)}
    return graph


def picture(rooms: Iterable[Room] = ROOMS) -> str:
    """The table for people, a room a line."""
    lines = ["| room | what it is for | imports |", "|---|---|---|"]
    for room in rooms:
        uses = (
            room.uses.replace(BASE, "tensors/*").replace(PARALLEL, "parallel/*").replace(PLANNER, "planner/*").split()
        )
        lines.append(f"| {room.name} | {room.purpose} | {', '.join(uses) or '-'} |")
    tensors, planner = (", ".join(group.split()) for group in (BASE, PLANNER))
    return "\n".join([*lines, "", f"tensors/* is {tensors}.", f"planner/* is {planner}."])


if __name__ == "__main__":
    page = ROOT / "CONTRIBUTING.md"
    page.write_text(PICTURE.sub(lambda _: picture(), page.read_text()))
