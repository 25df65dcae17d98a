"""Write docs/api.md from the docstrings of what is public: `python docs/make_api.py`."""

import ast
import importlib
import inspect
import re
import typing
from pathlib import Path
from typing import Any

from relibra_kernels.planner import DeviceSpec, ModelShape

MODULES = (
    ("relibra_kernels", "What most users need."),
    ("relibra_kernels.planner", "Traces, load tables, plans, the simulator. Needs numpy alone."),
    ("relibra_kernels.nn", "The layer as modules."),
    ("relibra_kernels.parallel", "Training under a plan."),
    ("relibra_kernels.integrations.transformers", "Hugging Face transformers 5."),
    ("relibra_kernels.integrations.megatron", "Megatron-LM: maps and replay targets for its own MoE layer."),
    ("relibra_kernels.integrations.megatron_shares", "Megatron: the tokens of a rank that shares its sequences."),
    ("relibra_kernels.integrations.verl", "verl."),
    ("relibra_kernels.integrations.slime", "slime."),
    ("relibra_kernels.integrations.batches", "What verl and slime share."),
)
# Read instead of imported: they need a package that need not be here.
READ_MODULES = (
    ("relibra_kernels.integrations.megatron_moe", "Megatron-core: our experts in its MoE layer, under a plan."),
    ("relibra_kernels.integrations.megatron_schedule", "Megatron-core: a batch around a run of its schedule."),
    ("relibra_kernels.integrations.megatron_optimizer", "Megatron-core: the optimizer whose state moves."),
)


def public_names(module: Any) -> list[str]:
    """`__all__`, or what the module itself defines."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if name != "__version__"]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def entry(name: str, value: Any) -> list[str]:
    """Heading, signature and docstring of one name, and the public methods of a class."""
    if not callable(value):
        return [f"### {name}", _what_it_holds(value)]
    lines = [f"### {name}", _block(f"{name}{signature(value)}"), _block(inspect.getdoc(value) or "")]
    if inspect.isclass(value):
        for attribute, member in _members(value).items():
            if isinstance(member, classmethod | staticmethod):
                member = getattr(value, attribute)
            documented = getattr(member, "__doc__", None)  # its own, not what it inherits
            if attribute.startswith("_") or not documented or not (callable(member) or isinstance(member, property)):
                continue
            first = inspect.cleandoc(documented).split("\n\n")[0].replace("\n", " ")
            forms = typing.get_overloads(member) or [member] if not isinstance(member, property) else []
            calls = " or ".join(f"`{attribute}{signature(form)}`" for form in forms) or f"`{attribute}`"
            lines.append(f"* {calls}: {first}")
    return lines


def _members(value: type) -> dict[str, Any]:
    """What a class defines, and what it inherits from classes of this package; its own first."""
    members: dict[str, Any] = {}
    for cls in value.__mro__:
        if cls.__module__.startswith("relibra_kernels"):
            members |= {name: member for name, member in vars(cls).items() if name not in members}
    return members


def signature(value: Any) -> str:
    """As it is written, in one line: annotations without the modules they come from, defaults as Python prints them.

    Empty where Python cannot tell.
    """
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    parts: list[str] = []
    last_kind = None
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and last_kind not in (
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        ):
            parts.append("*")
        last_kind = parameter.kind
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        annotated = "" if parameter.annotation is parameter.empty else f": {_annotation(parameter.annotation)}"
        equals = " = " if annotated else "="
        default = "" if parameter.default is parameter.empty else f"{equals}{_default(parameter.default)}"
        parts.append(f"{stars}{parameter.name}{annotated}{default}")
    returned = "" if found.return_annotation is found.empty else f" -> {_annotation(found.return_annotation)}"
    return f"({', '.join(parts)}){returned}"


def _annotation(annotation: Any) -> str:
    """Modules are left out, but for `torch.dtype` and its like."""
    if typing.get_origin(annotation) is typing.Unpack:  # its repr differs between Pythons
        return f"Unpack[{_annotation(typing.get_args(annotation)[0])}]"
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"ForwardRef\('([^']*)'[^)]*\)", r"\1", text)
    return re.sub(r"\b(?!torch\.\w+\b(?!\.))(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", text)


def entries_of_source(module_name: str) -> list[str]:
    """Headings, signatures and docstrings of the functions in a module's `__all__`, without importing it."""
    path = Path(__file__).parents[1].joinpath(*module_name.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    lines = []
    for name in ast.literal_eval(assigned["__all__"]):
        node = functions[name]
        call = f"{name}({ast.unparse(node.args)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")
        lines += [f"### {name}", _block(_annotation(call)), _block(ast.get_docstring(node) or "")]
    return lines


def _default(default: Any) -> str:
    if isinstance(default, ModelShape | DeviceSpec):
        return f"{type(default).__name__}({default.name!r}, ...)"
    if inspect.isroutine(default) or inspect.isclass(default):
        return default.__name__
    return re.sub(r"<factory>", "...", repr(default))


def _what_it_holds(value: Any) -> str:
    if isinstance(value, dict):
        return f"A `dict` with the keys {', '.join(f'`{key}`' for key in value)}."
    return f"A `{type(value).__name__}`."


def _block(text: str) -> str:
    return f"```text\n{text}\n```"


def render() -> str:
    index = (Path(__file__).parent / "quickstart.md").read_text().partition("\n\n")[0]
    parts = [index, "# API", "Made from the docstrings by `python docs/make_api.py`."]
    seen: set[int] = set()
    for module_name, summary in MODULES:
        module = importlib.import_module(module_name)
        parts += [f"## {module_name}", summary]
        for name in public_names(module):
            value = getattr(module, name)
            if id(value) in seen:
                parts.append(f"`{name}`: see above.")
                continue
            seen.add(id(value))
            parts += entry(name, value)
    for module_name, summary in READ_MODULES:
        parts += [f"## {module_name}", summary, *entries_of_source(module_name)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(render())
