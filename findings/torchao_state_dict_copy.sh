#!/usr/bin/env bash
# torchao 0.18.0, with torch 2.13.0 on Python 3.11, no GPU needed.
#
# The state of torchao's AdamW8bit holds tensor subclasses under the names of torch.optim.AdamW's states. Its state dict
# cannot be deep-copied, as keeping the best checkpoint in memory does it, while torch.optim.AdamW's can: the subclass has
# no aten.clone. torch.optim.AdamW loads the state dict without complaint.
#
# Seen:
#   exp_avg of the 8-bit optimizer is a OptimState8bit
#   deep copy of torch's state dict: done
#   deep copy of torchao's state dict: NotImplementedError, which names aten.clone
#   torch.optim.AdamW loads it: done
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install -q --target "$place/packages" torch==2.13.0 numpy
python3 -m pip install -q --no-deps --target "$place/packages" torchao==0.18.0
cat >"$place/found.py" <<'PYTHON'
import copy
import warnings

import torch

warnings.filterwarnings("ignore")
from torchao.optim import AdamW8bit


def trained(kind):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = kind([p], lr=0.1)
    p.grad = torch.randn(64, 64)
    optimizer.step()
    return p, optimizer


def tried(what):
    try:
        what()
    except NotImplementedError as error:
        return "NotImplementedError, which names aten.clone" if "aten.clone" in str(error) else f"other: {error}"
    return "done"


q, theirs = trained(torch.optim.AdamW)
p, coded = trained(AdamW8bit)
print("exp_avg of the 8-bit optimizer is a", type(coded.state[p]["exp_avg"]).__name__)
print("deep copy of torch's state dict:", tried(lambda: copy.deepcopy(theirs.state_dict())))
print("deep copy of torchao's state dict:", tried(lambda: copy.deepcopy(coded.state_dict())))
print("torch.optim.AdamW loads it:", tried(lambda: theirs.load_state_dict(coded.state_dict())))
PYTHON
PYTHONPATH="$place/packages" python3 "$place/found.py" >"$place/seen" 2>"$place/errors" || { cat "$place/errors"; exit 1; }
cat "$place/seen"
sed -n 's/^#   //p' "$0" | diff - "$place/seen"
