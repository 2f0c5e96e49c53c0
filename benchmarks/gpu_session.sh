#!/usr/bin/env bash
# Every benchmark, or the whole test suite, on a machine with a GPU, each in one call of less than ten minutes:
#     OUT=results benchmarks/gpu_session.sh benchmarks
#     OUT=results benchmarks/gpu_session.sh tests
# $OUT gets at most eight files: one JSON file a benchmark module, and a log. What only a GPU can answer comes first; each
# part has a limit, so that one that hangs leaves time for the others.
# Needs torch, triton and the packages of the `test` extra; installs nothing from a network.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
part=${1:?benchmarks or tests}
mkdir -p "${OUT:?a folder for what is found}"
OUT=$(realpath "$OUT")
log="$OUT/$part.log"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Where the package is not installed: a checkout alone is not importable, as triton_optim.kernels is the folder kernels/.
if ! $python -c 'import triton_optim.kernels' 2>/dev/null; then
    cp -r . "$scratch/checkout" && cd "$scratch/checkout" && cp -r kernels triton_optim/
    export PYTHONPATH=$PWD
fi
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" TRITON_CACHE_DIR="$scratch/triton"

{
    nvidia-smi || rocm-smi || true
    $python -c 'import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__, torch.cuda.is_available())'
} 2>&1 | tee "$log"

status=0
benchmark() { # seconds, then what pytest is to run
    timeout "$1" $python -m pytest "${@:2}" --patience 10 --results "$OUT" -q --tb=short --show-capture=no 2>&1 |
        tee -a "$log" || status=1
}
case $part in
    benchmarks)
        benchmark 230 benchmarks/test_gpu_step.py -k "bandwidth or AdamW or Lion"
        benchmark 70 benchmarks/test_models.py
        benchmark 60 benchmarks/test_whole_step.py
        benchmark 90 benchmarks/test_host_time.py benchmarks/test_launches.py benchmarks/test_import.py
        benchmark 110 benchmarks/test_cold_start.py -k 1000
        ;;
    tests)
        timeout 450 $python -m pytest -q --tb=short --show-capture=no --durations=15 2>&1 | tee -a "$log" || status=1
        benchmark 100 benchmarks/test_cpp_step.py -k AdamW
        ;;
esac
exit $status
