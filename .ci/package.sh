#!/usr/bin/env bash
# Wheel and sdist: built, checked, installed from the wheel into an empty environment, run and type-checked there.
# With TORCH_FROM=SITE-PACKAGES torch and what it needs are taken from that folder, and not downloaded.
# Before a release also with other Pythons, each with a torch: `bash .ci/package.sh python3.10:2.9.0 python3.14:2.13.0`.
# What came of their tests goes to benchmarks/results/suite.json and benchmarks/RESULTS.md, to be committed.
set -euo pipefail
cd "$(dirname "$0")/.."
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
export PIP_CONSTRAINT="$PWD/.ci/constraints.txt" PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export TRITON_CACHE_DIR="$place/triton" TRITON_OPTIM_CACHE_DIR="$place/cpp"
root=$PWD commit=$(git describe --always --dirty --abbrev=12)
section() { echo "=== $* ($(date +%T))"; }

section "build, from the files that git knows"
mkdir "$place/source" && git ls-files -z | tar --null -cf - -T - | tar -xf - -C "$place/source"
python3 -m venv "$place/tools"
"$place/tools/bin/pip" install build twine check-wheel-contents mypy pyright
"$place/tools/bin/python" -m build --outdir "$place/dist" "$place/source" >"$place/build.log" 2>&1 ||
    { cat "$place/build.log"; exit 1; }
"$place/tools/bin/twine" check --strict "$place"/dist/*
"$place/tools/bin/check-wheel-contents" "$place"/dist/*.whl

section "the wheel holds every file of triton_optim/ and kernels/"
git ls-files triton_optim kernels | grep -v -e README.md -e '^triton_optim/kernels$' |
    sed 's|^kernels/|triton_optim/kernels/|' | sort >"$place/wanted"
python3 -m zipfile -l "$place"/dist/*.whl | awk '/^triton_optim\// {print $1}' | sort >"$place/found"
diff "$place/wanted" "$place/found"

section "the sdist holds every file of the repository"
mkdir "$place/sdist" && tar -xzf "$place"/dist/*.tar.gz --strip-components 1 -C "$place/sdist"
git ls-files | while IFS= read -r file; do test -e "$place/sdist/$file" || { echo "$file is not there"; exit 1; }; done

section "installed, with nothing else, and run"
python3 -m venv "$place/empty"
deps=() packages=$(echo "$place"/empty/lib/python3*/site-packages)
if [ -n "${TORCH_FROM:-}" ]; then
    echo "$TORCH_FROM" >"$packages/torch.pth"
    deps=(--no-deps --ignore-installed)
fi
"$place/empty/bin/pip" install "${deps[@]}" "$place"/dist/*.whl
cp .ci/typed.py "$place/script.py"
cd "$place"
empty/bin/python script.py
TRITON_INTERPRET=1 empty/bin/python "$root/.ci/installed.py"
empty/bin/triton-optim doctor >doctor.txt
empty/bin/triton-optim list adamw | head -3

section "from a folder on PYTHONPATH"
empty/bin/pip install --no-deps --target "$place/folder" "$place"/dist/*.whl
PYTHONPATH="$place/folder" empty/bin/python -c "
import triton_optim.kernels.language as language
assert language.__file__.startswith('$place/folder'), language.__file__"

section "types, of a user's script"
tools/bin/mypy --strict --python-executable empty/bin/python --cache-dir "$place/mypy" script.py
tools/bin/pyright --pythonpath "$place/empty/bin/python" script.py

rm -r sdist/triton_optim sdist/kernels  # so that its tests take what is installed
grep -vE '^(torch|triton)==' "$root/.ci/constraints.txt" >constraints.txt
for pair in "$@"; do
    section "$pair: installed, run, and a few tests of the sdist"
    "${pair%:*}" -m venv --clear other
    PIP_CONSTRAINT="$place/constraints.txt" other/bin/pip install "$(echo dist/*.whl)[test]" "torch==${pair#*:}"
    other/bin/python script.py
    TRITON_INTERPRET=1 other/bin/python "$root/.ci/installed.py"
    other/bin/triton-optim doctor
    other/bin/python sdist/benchmarks/suite.py --results "$root/benchmarks/results" --commit "$commit" -- \
        tests/test_{accuracy,doctor,gather,readme,rules}.py -k "not test_accuracy or eager or cpp" || failed=$?
done
section "done"
exit "${failed:-0}"
