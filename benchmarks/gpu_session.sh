#!/usr/bin/env bash
# The whole test suite and every benchmark on a machine with a GPU, in one call of less than ten minutes:
#     OUT=results benchmarks/gpu_session.sh
# $OUT gets at most eight files: one JSON file a benchmark module, and the logs of the tests and of the benchmarks. What
# only a GPU can answer comes first; each part has a limit, so that one that hangs leaves time for the others.
# Needs torch, triton and the packages of the `test` extra; installs nothing from a network.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
mkdir -p "${OUT:?a folder for what is found}"
OUT=$(realpath "$OUT")
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
} 2>&1 | tee "$OUT/benchmarks.log"

status=0
benchmark() { # seconds, then what pytest is to run
    timeout "$1" $python -m pytest "${@:2}" --patience 10 --results "$OUT" -q --tb=short --show-capture=no 2>&1 |
        tee -a "$OUT/benchmarks.log" || status=1
}
benchmark 110 benchmarks/test_gpu_step.py
benchmark 70 benchmarks/test_host_time.py benchmarks/test_launches.py benchmarks/test_import.py
benchmark 60 benchmarks/test_whole_step.py
benchmark 60 benchmarks/test_models.py
timeout 210 $python -m pytest -q --tb=short --show-capture=no --durations=15 2>&1 | tee "$OUT/tests.log" || status=1
benchmark 110 benchmarks/test_cold_start.py -k 1000
benchmark 70 benchmarks/test_cpu_step.py -k AdamW
exit $status
