#!/usr/bin/env bash
# Triton 3.7.1, which torch 2.13.0 pins, on Python 3.14 (seen with 3.14.8), no GPU needed: python3.14 must be there.
#
# Where warnings are errors, as pytest's filterwarnings = error makes them, a kernel that calls tl.sum does not compile:
# Triton builds a syntax node of each default value without the field that Python 3.14 wants, and Python warns of that. The
# error says where in the kernel the call is; the warning is two causes below it. Triton 3.9.0 gives the field.
#
# Seen:
#   Triton 3.7.1, warnings ignored: compiles
#   Triton 3.7.1, DeprecationWarning an error: CompilationError
#   CompilationError of sum: AnnAssign.__init__ missing 1 required positional argument: 'simple'
#   Triton 3.9.0, warnings ignored: compiles
#   Triton 3.9.0, DeprecationWarning an error: compiles
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
for version in 3.7.1 3.9.0; do
    python3.14 -m venv "$place/$version"
    "$place/$version/bin/python" -m pip install -q triton==$version
done
cat >"$place/found.py" <<'PYTHON'
import re
import sys
import warnings

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError


@triton.jit
def total(x, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(x + i, tl.sum(tl.load(x + i), 0))


said, kind = ("warnings ignored", "ignore") if sys.argv[1] == "ignore" else ("DeprecationWarning an error", "error")
warnings.simplefilter(kind, DeprecationWarning)
source = ASTSource(total, {"x": "*fp32", "n": "constexpr"}, {(1,): 64})
try:
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
    print(f"Triton {triton.__version__}, {said}: compiles")
except CompilationError as error:
    print(f"Triton {triton.__version__}, {said}: {type(error).__name__}")
    while error.__cause__ is not None:
        error = error.__cause__
    name, words = (re.search(pattern, str(error))[1] for pattern in (r"def (\w+)", r"(AnnAssign[^.]*\.__init__[^.\"]*)"))
    print(f"{type(error).__name__} of {name}: {words}")
PYTHON
for version in 3.7.1 3.9.0; do
    for kind in ignore error; do
        TRITON_CACHE_DIR="$place/cache/$version/$kind" "$place/$version/bin/python" "$place/found.py" $kind
    done
done >"$place/seen" 2>"$place/errors" || { cat "$place/errors"; exit 1; }
cat "$place/seen"
sed -n 's/^#   //p' "$0" | diff - "$place/seen"
