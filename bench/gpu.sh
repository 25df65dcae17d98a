#!/usr/bin/env bash
# bench/gpu.py with the Python that is there, and the wheels in carried/ (bench/carry.sh) in front of it.
#
#   bench/gpu.sh [STAGE...] [--seconds N]        PYTHON=python3 by default
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if compgen -G 'carried/*.whl' > /dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    if "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" carried/*.whl; then
        export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    else
        echo "carried/ could not be unpacked; going on with what is installed" >&2
    fi
fi
"$python" bench/gpu.py "$@"
