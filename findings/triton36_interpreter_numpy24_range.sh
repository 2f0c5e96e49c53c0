#!/usr/bin/env bash
# Triton 3.6.0 with NumPy 2.4.6, Python 3.11, no GPU needed.
#
# In Triton 3.6's interpreter a loop over range(begin, end) whose bounds are values that a kernel loaded raises a
# TypeError with NumPy 2.4: the interpreter takes int() of an array of one dimension with one element, which NumPy 2.4
# refuses. With NumPy 2.3 the same loop runs, with a DeprecationWarning. Triton 3.9.0's interpreter runs it with both.
# Triton names no NumPy release that it needs.
#
# Seen:
#   triton 3.6.0, numpy 2.4.6: InterpreterError: TypeError('only 0-dimensional arrays can be converted to Python scalars')
#   triton 3.6.0, numpy 2.3.5: 6
#   triton 3.9.0, numpy 2.4.6: 6
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install -q --target "$place/torch" torch==2.13.0
rm -rf "$place/torch/numpy" "$place/torch/triton"
cat >"$place/found.py" <<'PYTHON'
import os
import sys
import warnings

warnings.simplefilter("ignore")
os.environ["TRITON_INTERPRET"] = "1"
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def add_up(bounds, out):
    total = 0
    for number in range(tl.load(bounds), tl.load(bounds + 1)):
        total += number
    tl.store(out, total)


out = torch.zeros(1, dtype=torch.int32)
try:
    add_up[(1,)](torch.tensor([1, 4], dtype=torch.int32), out)
    seen = out.item()
except Exception as error:
    seen = f"{type(error).__name__}: {error}"
print(f"triton {triton.__version__}, numpy {numpy.__version__}: {seen}")
PYTHON
for pair in "3.6.0 2.4.6" "3.6.0 2.3.5" "3.9.0 2.4.6"; do
    read -r triton numpy <<<"$pair"
    python3 -m pip install -q --no-deps --target "$place/$triton-$numpy" "triton==$triton" "numpy==$numpy"
    PYTHONPATH="$place/$triton-$numpy:$place/torch" python3 "$place/found.py"
done >"$place/seen" 2>"$place/errors" || { cat "$place/errors"; exit 1; }
cat "$place/seen"
sed -n 's/^#   //p' "$0" | diff - "$place/seen"
