#!/usr/bin/env bash
# prodigyopt 1.1.2, with torch 2.13.0 on Python 3.11, no GPU needed.
#
# Prodigy's step is d times the learning rate along the mean of the gradients, which is fed with d as it was before the
# step. With betas[0] = 0 there is no mean, and prodigyopt multiplies the gradient by d as it is after the step: where
# the estimate grows, the step is as many times as long as with a betas[0] next to 0, which comes to the same otherwise.
#
# Seen:
#   first step that differs: 2
#   the step there, as many times as long: 15.815
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install -q --target "$place/packages" torch==2.13.0 numpy
python3 -m pip install -q --no-deps --target "$place/packages" prodigyopt==1.1.2
cat >"$place/found.py" <<'PYTHON'
import torch
from prodigyopt import Prodigy

START = torch.tensor([1.0, -1.0], dtype=torch.float64)


def trained(beta1):
    """The parameter before and after each of eight steps with one gradient."""
    p = torch.nn.Parameter(START.clone())
    optimizer, told = Prodigy([p], lr=1.0, betas=(beta1, 0.999), d0=0.01), [START]
    for _ in range(8):
        p.grad = torch.tensor([1.0, -0.5], dtype=torch.float64)
        optimizer.step()
        told.append(p.detach().clone())
    return told


none, tiny = trained(0.0), trained(1e-12)
first = [torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(none, tiny)].index(False)
steps = [(told[first] - tiny[first - 1])[0].item() for told in (none, tiny)]
print("first step that differs:", first)
print(f"the step there, as many times as long: {steps[0] / steps[1]:.3f}")
PYTHON
PYTHONPATH="$place/packages" python3 "$place/found.py" >"$place/seen" 2>"$place/errors" || { cat "$place/errors"; exit 1; }
cat "$place/seen"
sed -n 's/^#   //p' "$0" | diff - "$place/seen"
