"""A process that compiles: a task a line on standard input, an outcome a line on standard output, both JSON.

    python -m relibra_kernels.tuning.compile_worker

A process of its own, because a compiler may take the one that it runs in down; started by name, so that nothing of the
caller's main module runs again.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict

from ..form import ExpertForm
from .compile_task import Outcome, Task, compile_task


def serve(compile_one: Callable[[Task], Outcome]) -> None:
    """Answer until standard input ends. What a compiler prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        fields = json.loads(line)
        outcome = compile_one(Task(**{**fields, "form": ExpertForm(**fields["form"])}))
        print(json.dumps(outcome if isinstance(outcome, str) else asdict(outcome)), file=answers, flush=True)


if __name__ == "__main__":
    serve(compile_task)
