"""The results as tables, for a terminal and for `docs/benchmarks.md`."""
from .case import Result
def tables(results: list[Result]) -> str:
    return "\n".join(f"{r.stage} {r.case} {r.status}" for r in results)
