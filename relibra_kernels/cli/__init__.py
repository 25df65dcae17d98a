"""`relibra COMMAND`: one module a command, imported only when it is the one that runs.

A command module has `add_arguments(parser)` and `run(args) -> int`. An error of the library is one line on stderr and
exit status 2; anything else is a defect and keeps its traceback. What lists the commands imports nothing, so that
`relibra --help` answers at once.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "bench": "time our experts on this machine against transformers' and what else is installed",
    "compile": "compile the kernels for a GPU that need not be here, and report what they need",
    "convert": "turn routing that an engine or a trainer recorded into a trace",
    "demo": "the whole loop on this machine: record routing, plan, train expert-parallel under the plan",
    "doctor": "say what is installed, what will be used and why, and which traps are set",
    "estimate": "say what a planned batch takes before it runs: bytes, memory, modelled time, and whether it pays",
    "inspect": "show what is in a trace, a plan or a load table, in one screen, or compare two plans",
    "plan": "plan a batch from load tables or a recorded trace, and say what the plan gains",
    "simulate": "price policies against each other on generated or recorded routing, and write a report",
    "tune": "find the fastest configs for a GPU: measured on it, or compiled and ranked where it is not here",
    "watch": "show how a training run goes, from the lines that it logs",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other error; `--help` shows the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of `relibra`. Only `command` gets its arguments, so that `relibra plan` never imports torch."""
    parser = _Parser(prog="relibra", description="Balanced Mixture-of-Experts RL training.")
    parser.add_argument("--version", action="version", version=f"relibra-kernels {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == command:
            importlib.import_module(f".{name}", __name__).add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status. Without one, show what there is."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        build_parser().print_help()
        return 0
    if argv[0] not in COMMANDS and not argv[0].startswith("-"):
        near = difflib.get_close_matches(argv[0].lower(), COMMANDS, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        build_parser().error(f"{argv[0]!r} is no command{meant}; there are {', '.join(COMMANDS)}")
    args = build_parser(argv[0]).parse_args(argv)
    from ..planner.errors import ReLibraError

    try:
        return importlib.import_module(f".{args.command}", __name__).run(args)
    except ReLibraError as error:
        print(f"relibra {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nrelibra {args.command}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `relibra ... | head`
        sys.stderr.close()
        return 141


def _version() -> str:
    from .. import __version__

    return __version__
