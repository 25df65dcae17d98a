#!/usr/bin/env bash
# Everything that matters on a GPU, in under 8 minutes: kernels against float64, then the sweep with TFLOP/s, roofline
# fraction and peers. Installs nothing; uses the Python that is there (torch 2.11 or newer, Triton 3.6 or newer).
#
#   bench/gpu.sh [RESULTS.json]          PYTHON=python3 by default
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())'
timeout 200 "$python" -m pytest -q -p no:cacheprovider tests/relibra_kernels/test_gpu.py
timeout 270 "$python" bench/gpu_report.py --seconds 210 --json "${1:-gpu-results.json}"
