"""The shipped configs as a table for the docs: what each device gets for a layer of middling size.

python bench/tuning_table.py [--write docs/tuning.md]
"""

import argparse
import sys
from pathlib import Path

from relibra_kernels.configs.files import SHIPPED, load_entries, path_of
from relibra_kernels.configs.products import PRODUCTS
from relibra_kernels.tuning.catalogue import PARTS

BEGIN, END = "<!-- table: make tune-offline -->", "<!-- end of table -->"
MODEL, WITH_BIASES, BUCKET = "Qwen3-30B-A3B", "gpt-oss-120b", (32, 1024)
OTHER_BUCKETS = {"permute": (1, 4096), "swiglu": (1, 16384), "replica_reduce": (1, 1)}


def table(folder: Path = SHIPPED) -> str:
    """Markdown: a row a kernel and part, a column a device."""
    devices = [device for device in PRODUCTS if (folder / device).is_dir()]
    lines = ["| kernel, part | " + " | ".join(devices) + " |", "|---" * (len(devices) + 1) + "|"]
    buckets, evidence = dict.fromkeys(devices, 0), dict[str, int]()
    for kernel, parts in PARTS.items():
        entries = {device: load_entries(path_of(folder, device, kernel), device, kernel) for device in devices}
        model = WITH_BIASES if kernel == "grad_bias" else MODEL
        for part in parts:
            found = [
                {
                    (bucket.slots, bucket.rows_per_slot): bucket.config
                    for entry in entries[device]
                    if entry.part == part and model in entry.models
                    for bucket in entry.buckets
                }
                for device in devices
            ]
            cells = [configs.get(OTHER_BUCKETS.get(kernel, BUCKET), "") for configs in found]
            lines.append(f"| {kernel}, {part} | " + " | ".join(cells) + " |")
        for device in devices:
            for entry in entries[device]:
                buckets[device] += len(entry.buckets)
                evidence[entry.evidence] = evidence.get(entry.evidence, 0) + len(entry.buckets)
    lines.append("| *buckets shipped* | " + " | ".join(str(buckets[device]) for device in devices) + " |")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(evidence.items()))
    return f"Of {sum(evidence.values())} buckets: {kinds}.\n\n" + "\n".join(lines)


def written(text: str, found: str) -> str:
    """`text` with `found` between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{found}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="put the table between the marks of this file")
    args = parser.parse_args()
    if args.write is None:
        print(table())
    else:
        args.write.write_text(written(args.write.read_text(encoding="utf-8"), table()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
