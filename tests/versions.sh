#!/usr/bin/env bash
# Makes environments of the versions that we support, on a machine without a GPU, runs in each what each must pass, and
# writes what came out into the rows of docs/versions.md as it goes; 1 where a check fails. Needs no GPU.
#
#   tests/versions.sh [ENVIRONMENT...] [CHECK...]        all of them where none is named
#
# Environments: image: of GPU machines, Python 3.12 with torch 2.11.0, Triton 3.6.0, numpy 2.5, transformers 5.17; what
# needs Triton's interpreter runs with numpy 2.3.5, since Triton 3.6's needs one before 2.4. pins: constraints.txt. newest:
# what the package index has, and Triton 3.9.0. One takes 6 GB in .venv/versions and is kept.
# Checks: versions; imports: of every module; planner: its tests; rehearsal: bench/gpu.py without a GPU; huggingface: its
# tests; interpreter: the kernels' tests; sm_80, sm_90, sm_100, sm_103, gfx942, gfx950: one config a kernel compiled for that
# GPU (not sm_103 in image, whose Triton cannot read its code).
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$PWD/.venv/versions
page=docs/versions.md
mkdir -p "$folder"
environments=()
checks=()
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
        "${pip[@]}" filelock typing-extensions sympy networkx jinja2 fsspec "$4" "$5" accelerate peft pytest \
            pytest-benchmark hypothesis scipy matplotlib tqdm rich safetensors setuptools &&
        "${pip[@]}" --no-deps nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc 'nvidia-cuda-runtime<14' nvidia-cudnn-cu13 \
            nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 \
            nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx "$3" && touch "$env/made"
}

# check NAME CHECK PYTHON: run it, and write its last line of output, without times, into its row of the page
check() {
    local log=$folder/$1-$2.log status=passed counts row
    "$2" "$3" > "$log" 2> "$log.errors" || { status=FAILED failed=1; tail -n 40 "$log" "$log.errors" >&2; }
    counts=$(grep -v '^ *$' "$log" | grep -v '^|' | tail -1 | sed -E 's/ in [0-9.]+s.*//; s/^=+ //; s/, [0-9]+ warnings?//; s/\|/ /g' | cut -c1-150)
    row="| $1 | $2 | $status | ${counts:--} | $(date +%F) |"
    echo "$row"
    awk -v key="| $1 | $2 |" -v row="$row" 'index($0, key) == 1 { print row; found = 1; next } { print } END { exit !found }' \
        "$page" > "$folder/page" && cp "$folder/page" "$page" || { echo "$page has no row for $1 $2" >&2 && failed=1; }
}

versions() {
    "$1" -c 'import sys, torch, triton, numpy, transformers as t
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, Triton {triton.__version__}, "
      f"numpy {numpy.__version__}, transformers {t.__version__}")'
}

# a module that needs Megatron, which no environment has, is named as not imported
imports() {
    "$1" -c 'import importlib, pkgutil, relibra_kernels as package
count, without = 0, []
for module in pkgutil.walk_packages(package.__path__, "relibra_kernels."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
            count += 1
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "megatron":
                raise
            without.append(module.name.removeprefix("relibra_kernels."))
print(count, "modules" + "".join(f"; not {name}: no Megatron" for name in without))'
}

tests() { "$1" -m pytest -q -p no:cacheprovider "${@:2}"; }

planner() { tests "$1" tests/planner; }

huggingface() { tests "$1" tests/relibra_kernels/integrations/test_hf_*.py; }

interpreter() { PYTHONPATH=$PYTHONPATH$front tests "$1" tests/relibra_kernels/test_interpreted.py; }

rehearsal() {
    local out
    out=$(mktemp -d)
    OUT=$out PYTHONPATH=$PYTHONPATH$front "$1" bench/gpu.py --rehearse
    local status=$?
    rm -r "$out"
    return "$status"
}

for target in sm_80 sm_90 sm_100 sm_103 gfx942 gfx950; do
    eval "$target() { \"\$1\" -m relibra_kernels compile --target $target --first; }"
done

for word in "$@"; do
    case $word in
    image | pins | newest) environments+=("$word") ;;
    versions | imports | planner | rehearsal | huggingface | interpreter | sm_80 | sm_90 | sm_100 | sm_103 | gfx942 | gfx950) checks+=("$word") ;;
    *)
        echo "$word is neither an environment (image, pins, newest) nor a check (versions, imports, planner, rehearsal," \
            "huggingface, interpreter, sm_80, sm_90, sm_100, sm_103, gfx942, gfx950)" >&2
        exit 2
        ;;
    esac
done
[ ${#environments[@]} -gt 0 ] || environments=(image pins newest)
[ ${#checks[@]} -gt 0 ] ||
    checks=(versions imports planner rehearsal huggingface interpreter sm_80 sm_90 sm_100 sm_103 gfx942 gfx950)

export PYTHONPATH=$PWD
for environment in "${environments[@]}"; do
    python=$folder/$environment/bin/python
    front= # a folder of packages that replace others where Triton's interpreter runs
    case $environment in
    image)
        make_environment image torch==2.11.0 triton==3.6.0 numpy==2.5.2 transformers==5.17.0 || exit
        [ -d "$folder/numpy-2.3.5" ] ||
            "$python" -m pip install --quiet --no-deps --target "$folder/numpy-2.3.5" numpy==2.3.5 || exit
        front=:$folder/numpy-2.3.5
        ;;
    pins) make .venv/installed > /dev/null && python=$PWD/.venv/bin/python || exit ;;
    newest) make_environment newest torch triton==3.9.0 numpy transformers || exit ;;
    esac
    for one in "${checks[@]}"; do
        [ "$environment $one" != "image sm_103" ] || continue
        check "$environment" "$one" "$python"
    done
done
exit "$failed"
