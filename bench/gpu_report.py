"""The tables of a GPU's results: to standard output, or into the page between its two marks.

python bench/gpu_report.py results.jsonl [--write docs/benchmarks.md]
"""

import argparse
import re
import sys
from pathlib import Path

from gpu_stages.case import results_of
from gpu_stages.table import tables

PLACE = re.compile(r"(?<=<!-- measured on a GPU -->\n\n).*?(?=\n\n<!-- end -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--write", type=Path, help="a page: kernels at 8192 tokens, all else whole")
    args = parser.parse_args()
    results = results_of(args.results)
    if args.write is None:
        print(tables(results))
        return 0
    if not results or any(result.device == "rehearsal" for result in results):
        print(f"{args.results} has no results of a GPU: nothing is written", file=sys.stderr)
        return 1
    page = args.write.read_text(encoding="utf-8")
    if not PLACE.search(page):
        print(f"{args.write} has no place between the marks 'measured on a GPU' and 'end'", file=sys.stderr)
        return 1
    args.write.write_text(PLACE.sub(lambda _: tables(results, brief=True).strip(), page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
