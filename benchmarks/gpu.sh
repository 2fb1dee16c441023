#!/usr/bin/env bash
# Tests and measurements on a machine with one CUDA GPU: Python 3.11 or 3.12 with a CUDA build of PyTorch, nothing else needed.
#
#   bash benchmarks/gpu.sh wheels            on a machine with a network: fetch into $WHEELS what the other one may lack
#   bash benchmarks/gpu.sh tests             the GPU tests                                        (each part at most
#   bash benchmarks/gpu.sh training          350M and 1.3B models, with and without exits          8 minutes with
#   bash benchmarks/gpu.sh decoding          full, early exit, speculation, against transformers   its installation)
#   bash benchmarks/gpu.sh all | table       all parts one after the other | the results so far
#
# Results are written after every case to $RESULTS/gpu_PART_MACHINE_DATE.json. The same command goes on with what is not
# there yet; --again measures all once more; --toy runs the control flow with tiny models, also without a GPU.
#
# WHEELS (default: wheels): folder of wheels; without it missing packages come from the package index.
# PACKAGES (default: build/gpu-packages): where they are installed, beside PyTorch's environment, which stays as it is.
# RESULTS (default: benchmarks/results). PYTHON (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-wheels} PACKAGES=${PACKAGES:-build/gpu-packages} RESULTS=${RESULTS:-benchmarks/results}
export PYTHONPATH="$PWD:$PACKAGES${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
STARTED=$(date +%s)

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 2; }

# Requirements of the product and of its tests that this interpreter cannot import, one a line; never PyTorch's own.
missing() { "$PYTHON" -m benchmarks.gpu.requirements "$@"; }

fetch_wheels() {
    mkdir -p "$WHEELS"
    missing --python-version 3.12 --all | while read -r requirement; do
        "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
            --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
            --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest "$WHEELS" "$requirement"
    done
    ls -l "$WHEELS"
}

install_missing() {
    local requirements
    mapfile -t requirements < <(missing)
    [ ${#requirements[@]} = 0 ] && return
    echo "installing into $PACKAGES: ${requirements[*]}" >&2
    local from=()
    [ -d "$WHEELS" ] && from=(--no-index --find-links "$WHEELS")
    # --no-deps: PyTorch is there already, and must not be replaced by another build.
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$PACKAGES" "${from[@]}" "${requirements[@]}"
}

part=${1:-}
[ $# -gt 0 ] && shift
case "$part" in
    wheels) fetch_wheels ;;
    table) "$PYTHON" -m benchmarks.gpu table --results "$RESULTS" ;;
    tests | training | decoding)
        install_missing
        "$PYTHON" -m benchmarks.gpu "$part" --results "$RESULTS" --started "$STARTED" "$@"
        ;;
    all)
        install_missing
        for one in tests training decoding; do
            # A part that fails does not keep the others from running.
            "$PYTHON" -m benchmarks.gpu "$one" --results "$RESULTS" "$@" || failed="${failed:-} $one"
        done
        [ -z "${failed:-}" ] || { echo "failed:$failed" >&2; exit 1; }
        ;;
    *) usage ;;
esac
