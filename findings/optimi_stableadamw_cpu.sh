#!/usr/bin/env bash
# torch-optimi 0.3.3, with torch 2.13.0 and Triton 3.9.0 on Python 3.11, on Linux, on a machine without a GPU.
#
# optimi uses its Triton kernels by default where all parameters with gradients lie on a GPU that Triton knows. StableAdamW
# asks so before it has collected any parameter, and of none it is true of all: a step on a CPU fails in Triton's search for
# a driver, in words that name neither optimizer nor argument. Its other optimizers collect first, and step on a CPU as they
# are; StableAdamW does with triton=False.
#
# Seen:
#   AdamW: stepped
#   Adan: stepped
#   Lion: stepped
#   StableAdamW: RuntimeError: 0 active drivers ([]). There should only be one.
#   StableAdamW, triton=False: stepped
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install -q --target "$place/packages" torch==2.13.0 triton==3.9.0 numpy
python3 -m pip install -q --no-deps --target "$place/packages" torch-optimi==0.3.3
cat >"$place/found.py" <<'PYTHON'
import optimi
import torch


def stepped(name, **options):
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    try:
        getattr(optimi, name)([p], lr=0.1, **options).step()
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "stepped"


for name in ("AdamW", "Adan", "Lion", "StableAdamW"):
    print(f"{name}: {stepped(name)}")
print("StableAdamW, triton=False:", stepped("StableAdamW", triton=False))
PYTHON
PYTHONPATH="$place/packages" python3 "$place/found.py" >"$place/seen" 2>"$place/errors" || { cat "$place/errors"; exit 1; }
cat "$place/seen"
sed -n 's/^#   //p' "$0" | diff - "$place/seen"
