#!/usr/bin/env bash
# Makes environments of the versions that we support, on a machine without a GPU, and runs in each what each must pass:
# imports, the kernels in Triton's interpreter, the compile gate, the Hugging Face tests. Prints a table; 1 where one fails.
#
#   tests/versions.sh [image] [pins] [newest]
#
# image: of GPU machines, Python 3.12 with torch 2.11.0, Triton 3.6.0, numpy 2.5, transformers 5.17; its interpreter tests
# run with numpy 2.3.5, since Triton 3.6's interpreter needs one before 2.4. pins: constraints.txt. newest: what the package
# index has, and Triton 3.9.0. An environment takes 6 GB in .venv/versions and is kept.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$PWD/.venv/versions
mkdir -p "$folder"
table=()
failed=0

python312() {
    local python
    for python in ${PYTHON312:-} python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python; do
        "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2> /dev/null && echo "$python" && return
    done
    echo "no Python 3.12 is found: name one in PYTHON312" >&2
    return 1
}

# make_environment NAME TORCH TRITON NUMPY TRANSFORMERS: torch first and alone; at last the libraries that it links to, in
# any version, which is enough to import it, and Triton, for which others may have put torch's own
make_environment() {
    local env=$folder/$1 python pip
    [ -f "$env/made" ] && return
    python=$(python312) && "$python" -m venv "$env" || return
    pip=("$env/bin/python" -m pip install --quiet)
    "${pip[@]}" --no-deps "$2" "$3" &&
        "${pip[@]}" filelock typing-extensions sympy networkx jinja2 fsspec "$4" "$5" accelerate pytest pytest-benchmark \
            hypothesis scipy matplotlib tqdm rich safetensors setuptools &&
        "${pip[@]}" --no-deps nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc 'nvidia-cuda-runtime<14' nvidia-cudnn-cu13 \
            nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 \
            nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx "$3" && touch "$env/made"
}

# check NAME WHAT COMMAND...: run it, and keep its last line for the table
check() {
    local name=$1 what=$2 log status=passed last
    log=$folder/$1-${2// /-}.log
    shift 2
    "$@" > "$log" 2>&1 || { status=FAILED failed=1; tail -40 "$log" >&2; }
    last=$(grep -v '^ *$' "$log" | tail -1 | cut -c1-90)
    table+=("$(printf '| %-16s | %-17s | %-6s | %s |' "$name" "$what" "$status" "$last")")
    echo "${table[-1]}"
}

versions() {
    "$1" -c 'import sys, torch, triton, numpy, transformers as t
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, Triton {triton.__version__}, "
      f"numpy {numpy.__version__}, transformers {t.__version__}")'
}

import_all() {
    "$1" -c 'import importlib, pkgutil, relibra_kernels as package
count = 0
for module in pkgutil.walk_packages(package.__path__, "relibra_kernels."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        count += 1
print(count, "modules imported")'
}

gate() {
    local target
    for target in sm_80 sm_90 sm_100 gfx942 gfx950; do
        "$1" -m relibra_kernels compile --target "$target" --first || return
    done
}

interpreted() { "$1" -m pytest -q -p no:cacheprovider tests/relibra_kernels/test_interpreted.py; }

hugging_face() { "$1" -m pytest -q -p no:cacheprovider tests/relibra_kernels/integrations/test_hf_*.py; }

# all NAME PYTHON [FRONT]: FRONT is a folder of packages that replace others for the interpreter tests
all() {
    local python=$2 front=${3:-}
    export PYTHONPATH=$PWD
    check "$1" versions versions "$python"
    check "$1" imports import_all "$python"
    check "$1" "compile gate" gate "$python"
    PYTHONPATH=$PWD${front:+:$front} check "$1" "interpreter tests" interpreted "$python"
    check "$1" "Hugging Face" hugging_face "$python"
}

for name in "${@:-image pins newest}"; do
    for one in $name; do
        case $one in
        image)
            make_environment image torch==2.11.0 triton==3.6.0 numpy==2.5.2 transformers==5.17.0 || exit
            [ -d "$folder/numpy-2.3.5" ] || "$folder/image/bin/python" -m pip install --quiet --no-deps \
                --target "$folder/numpy-2.3.5" numpy==2.3.5 || exit
            all image "$folder/image/bin/python" "$folder/numpy-2.3.5"
            ;;
        pins) make .venv/installed > /dev/null && all pins "$PWD/.venv/bin/python" || exit ;;
        newest) make_environment newest torch triton==3.9.0 numpy transformers && all newest "$folder/newest/bin/python" || exit ;;
        *) echo "no environment is called $one; there are image, pins and newest" >&2 && exit 2 ;;
        esac
    done
done
printf '%s\n' "${table[@]}" | tee "$folder/table.md"
exit "$failed"
