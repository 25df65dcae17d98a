"""How traces and plans show themselves: a line where they are printed, a small table in a notebook."""

import html
from collections.abc import Mapping


def line_of(name: str, facts: Mapping[str, object]) -> str:
    """`RoutingTrace(9 sequences, 120 tokens, ...)`."""
    return f"{name}({', '.join(f'{value} {what}' for what, value in facts.items())})"


def table_of(name: str, facts: Mapping[str, object]) -> str:
    """The same facts as an HTML table, one a row."""
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<table><caption>{html.escape(name)}</caption>{rows}</table>"
