#!/usr/bin/env bash
# Gathers, on a machine with a package index, the wheels that a bare GPU machine (x86-64, Python 3.12, torch 2.11) lacks:
# transformers with its expert-parallel hook, and Liger to compare with. 15 MB, in carried/, which git ignores.
#
#   bench/carry.sh [MORE==VERSION...]
set -euo pipefail
cd "$(dirname "$0")/.."
platforms=()
for tag in manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64; do
    platforms+=(--platform "$tag")
done
mkdir -p carried
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --dest carried transformers==5.23.0 liger-kernel==0.8.5 "$@"
ls -l carried
cat <<'TEXT'
Take carried/ along beside the checkout. bench/gpu.sh unpacks it into a folder of its own, in front of what is installed
there; nothing is installed or changed:

  OUT=results bench/gpu.sh smoke correct --seconds 560       # where a command may take ten minutes
  OUT=results bench/gpu.sh kernels layer step --seconds 560
  OUT=results bench/gpu.sh tune --seconds 480

Send back results/results.jsonl and results/gpu-results.tar.gz.
TEXT
