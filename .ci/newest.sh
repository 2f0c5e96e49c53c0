#!/usr/bin/env bash
# Before a release, by hand: the test suite in a fresh environment with the newest torch and Triton that pip gives, or
# with others: `bash .ci/newest.sh torch==2.14.1`. It fetches gigabytes and takes most of an hour. The outcome goes to
# benchmarks/results/suite.json and benchmarks/RESULTS.md, to be committed.
set -euo pipefail
cd "$(dirname "$0")/.."
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
# Only torch and its compiler are free: what our rules are compared with is the same for all.
grep -vE '^(torch|triton)==' .ci/constraints.txt >"$place/constraints.txt"
export PIP_CONSTRAINT="$place/constraints.txt" PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$place/venv"
export PATH="$place/venv/bin:$PATH"

pip install -e ".[test]" "$@"
python benchmarks/suite.py --results benchmarks/results || failed=$?
python benchmarks/report.py
exit "${failed:-0}"
