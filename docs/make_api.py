"""Write docs/api.md from the docstrings of what is public: `python docs/make_api.py`."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

MODULES = (
    ("relibra_kernels", "What most users need."),
    ("relibra_kernels.planner", "Traces, load tables, plans, the simulator. Needs numpy alone."),
    ("relibra_kernels.nn", "The layer as modules."),
    ("relibra_kernels.integrations.transformers", "Hugging Face transformers 5."),
    ("relibra_kernels.integrations.megatron", "Megatron-LM."),
    ("relibra_kernels.integrations.verl", "verl."),
    ("relibra_kernels.integrations.slime", "slime."),
    ("relibra_kernels.integrations.batches", "What verl and slime share."),
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
        return [f"### {name}", f"A `{type(value).__name__}`."]
    lines = [
        f"### {name}",
        "```text",
        f"{name}{_signature(value)}",
        "```",
        "```text",
        inspect.getdoc(value) or "",
        "```",
    ]
    if inspect.isclass(value):
        for attribute, member in vars(value).items():
            documented = inspect.getdoc(member)
            if attribute.startswith("_") or not documented or not (callable(member) or isinstance(member, property)):
                continue
            first = documented.split("\n\n")[0].replace("\n", " ")
            lines.append(f"* `{attribute}{'' if isinstance(member, property) else _signature(member)}`: {first}")
    return lines


def _signature(value: Any) -> str:
    try:
        signature = str(inspect.signature(value)).replace("'", "")
        return re.sub(r"<function (\S+) at 0x[0-9a-f]+>", r"\1", signature)  # an address differs from run to run
    except (TypeError, ValueError):
        return ""


def render() -> str:
    parts = ["# API", "Made from the docstrings by `python docs/make_api.py`."]
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
    return "\n\n".join(parts).replace("\n\n```text\n\n", "\n\n```text\n").replace("\n\n```\n\n", "\n```\n\n") + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(render())
