#!/usr/bin/env bash
# dadaptation 3.2 and prodigyopt 1.1.2, with torch 2.13.0 on Python 3.11, no GPU needed.
#
# Both refuse learning rates that differ between groups but for 0, the way to freeze a group. A group whose rate is 0 from
# the first step on stands still, but not with dadaptation's Lion, which moves every group by the largest rate of all. One
# whose rate becomes 0 later is left out of the estimate, and goes on along the mean that it had then. A decoupled decay
# has the largest rate, too, so that a frozen group decays.
#
# Seen, of the group whose rate is 0, in the sixth step:
#   DAdaptAdam: 0 from the first on: stands still; from the fourth on: moves; from the first on, with decay: moves
#   DAdaptLion: 0 from the first on: moves; from the fourth on: moves; from the first on, with decay: moves
#   Prodigy: 0 from the first on: stands still; from the fourth on: moves; from the first on, with decay: moves
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install -q --target "$place/packages" torch==2.13.0 numpy
python3 -m pip install -q --no-deps --target "$place/packages" dadaptation==3.2 prodigyopt==1.1.2
cat >"$place/found.py" <<'PYTHON'
import contextlib
import io

import torch
from dadaptation import DAdaptAdam, DAdaptLion
from prodigyopt import Prodigy


def sixth_step(kind, since, **options):
    """What it does to a parameter whose learning rate is 0 since some step."""
    params = [torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
    with contextlib.redirect_stdout(io.StringIO()):  # which says how it decays
        optimizer = kind([{"params": [p]} for p in params], lr=1.0, d0=1e-3, **options)
    for step in range(6):
        optimizer.param_groups[1]["lr"] = 0.0 if step >= since else 1.0
        for p in params:
            p.grad = torch.tensor([1.0, -0.5], dtype=torch.float64)
        before = params[1].detach().clone()
        optimizer.step()
    return "stands still" if torch.equal(params[1], before) else "moves"


for kind in (DAdaptAdam, DAdaptLion, Prodigy):
    decay = {"weight_decay": 0.1} | ({} if kind is DAdaptLion else {"decouple": True})
    print(
        f"{kind.__name__}: 0 from the first on: {sixth_step(kind, 0)}; from the fourth on: {sixth_step(kind, 3)}; "
        f"from the first on, with decay: {sixth_step(kind, 0, **decay)}"
    )
PYTHON
PYTHONPATH="$place/packages" python3 "$place/found.py" >"$place/seen" 2>"$place/errors" || { cat "$place/errors"; exit 1; }
cat "$place/seen"
sed -n 's/^#   //p' "$0" | diff - "$place/seen"
