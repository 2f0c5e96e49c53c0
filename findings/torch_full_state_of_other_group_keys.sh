#!/usr/bin/env bash
# torch 2.13.0 on Python 3.11, on Linux, no GPU needed.
#
# torch.distributed.checkpoint.state_dict.set_optimizer_state_dict of a full state dict fails with a bare KeyError where a
# parameter group of the checkpoint has a key that the optimizer's group lacks, as an option that an optimizer has only
# where it was asked for. The same state dict loads with broadcast_from_rank0=True, and without full_state_dict.
#
# Seen:
#   sharded: no error
#   broadcast: no error
#   full: KeyError: 'param_groups.0.note'
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install -q --target "$place/packages" torch==2.13.0 numpy
cat >"$place/found.py" <<'PYTHON'
import sys

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
kinds = {
    "sharded": StateDictOptions(),
    "broadcast": StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    "full": StateDictOptions(full_state_dict=True),
}
for kind, options in kinds.items():
    model = torch.nn.Linear(2, 2)
    saved = torch.optim.AdamW([{"params": model.parameters(), "note": 1}])
    state = get_optimizer_state_dict(model, saved, options=options)
    try:
        set_optimizer_state_dict(model, torch.optim.AdamW(model.parameters()), state, options=options)
        print(f"{kind}: no error", flush=True)
    except KeyError as error:
        print(f"{kind}: {type(error).__name__}: {error}", flush=True)
torch.distributed.destroy_process_group()
PYTHON
PYTHONPATH="$place/packages" python3 "$place/found.py" "$place/store" >"$place/seen" 2>"$place/errors" || { cat "$place/errors"; exit 1; }
cat "$place/seen"
sed -n 's/^#   //p' "$0" | diff - "$place/seen"
