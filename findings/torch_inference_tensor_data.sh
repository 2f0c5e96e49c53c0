#!/usr/bin/env bash
# torch 2.13.0 on Python 3.11, no GPU needed.
#
# A tensor that was made in inference mode and whose .data was then set to an ordinary tensor says that it is ordinary, and
# is neither: it still has no version counter. Outside of inference mode no view of it can be made, it can't be written,
# and torch.compile can't take it; what only reads it works, torch's own optimizers with it as a gradient, too. A view of
# its .data can be made.
#
# Seen:
#   is_inference(): False
#   t * 2: works
#   torch.empty(4).copy_(t): works
#   t.view(2, 2): RuntimeError: Inference tensors do not track version counter.
#   t[1:]: RuntimeError: Inference tensors do not track version counter.
#   t.add_(1): RuntimeError: Inplace update to inference tensor outside InferenceMode is not allowed.
#   t.data.view(2, 2): works
#   AdamW with it as a gradient, one by one: works
#   AdamW with it as a gradient, fused: works
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install -q --target "$place/packages" torch==2.13.0 numpy
cat >"$place/found.py" <<'PYTHON'
import torch

with torch.inference_mode():
    t = torch.zeros(4)
t.data = torch.ones(4)
print(f"is_inference(): {t.is_inference()}")


def adamw(**options):
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = t
    torch.optim.AdamW([p], **options).step()


for what, call in {
    "t * 2": lambda: t * 2,
    "torch.empty(4).copy_(t)": lambda: torch.empty(4).copy_(t),
    "t.view(2, 2)": lambda: t.view(2, 2),
    "t[1:]": lambda: t[1:],
    "t.add_(1)": lambda: t.add_(1),
    "t.data.view(2, 2)": lambda: t.data.view(2, 2),
    "AdamW with it as a gradient, one by one": lambda: adamw(foreach=False),
    "AdamW with it as a gradient, fused": lambda: adamw(fused=True),
}.items():
    try:
        call()
        print(f"{what}: works")
    except RuntimeError as error:
        print(f"{what}: RuntimeError: {str(error).split('.')[0]}.")
PYTHON
PYTHONPATH="$place/packages" python3 "$place/found.py" >"$place/seen" 2>"$place/errors" || { cat "$place/errors"; exit 1; }
cat "$place/seen"
sed -n 's/^#   //p' "$0" | diff - "$place/seen"
