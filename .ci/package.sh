#!/usr/bin/env bash
# Wheel and sdist: built, checked, installed from the wheel into an empty environment, run and type-checked there.
# With TORCH_FROM=SITE-PACKAGES torch and what it needs are taken from that folder, and not downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
export PIP_CONSTRAINT="$PWD/.ci/constraints.txt" PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export TRITON_CACHE_DIR="$place/triton" TRITON_OPTIM_CACHE_DIR="$place/cpp"
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
git ls-files triton_optim kernels | grep -v README.md | sed 's|^kernels/|triton_optim/kernels/|' | sort >"$place/wanted"
python3 -m zipfile -l "$place"/dist/*.whl | awk '/^triton_optim\// {print $1}' | sort >"$place/found"
diff "$place/wanted" "$place/found"

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
TRITON_INTERPRET=1 empty/bin/python - <<'PYTHON'
import sysconfig
from importlib.metadata import version

import torch

import triton_optim
from triton_optim import kernels

for module in (triton_optim, kernels):
    assert module.__file__.startswith(sysconfig.get_path("purelib")), module.__file__
assert version("triton-optim") == triton_optim.__version__
for backend in ("triton", "cpp", "compiled", "eager"):
    p = torch.nn.Parameter(torch.ones(100))
    p.grad = torch.ones(100)
    optimizer = triton_optim.SGD([p], lr=0.25, backend=backend)
    optimizer.step()
    assert p.tolist() == [0.75] * 100, backend
    assert triton_optim.explain(optimizer)[0].backend == backend
PYTHON
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
section "done"
