#!/usr/bin/env bash
# torch 2.13.0 on Python 3.11, on Linux, no GPU needed.
#
# torch.multiprocessing.spawn pickles its arguments first and starts the process afterwards. A CPU tensor is pickled as a
# file descriptor of its shared memory, and nothing keeps that open but the tensor. So an object whose __getstate__ makes
# tensors, as a copy of what it holds, can't be handed to a process: they are gone before it starts, and their descriptors
# have become those of the next ones. The error names neither tensor nor object. Tensors that the object still holds go
# through.
#
# Seen:
#   copies: ValueError: bad value(s) in fds_to_keep
#   child: 3.0
#   held: no error
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install -q --target "$place/packages" torch==2.13.0 numpy
cat >"$place/found.py" <<'PYTHON'
import torch


class Holder:
    """Its state is of copies, or of the tensors that it holds."""

    def __init__(self, copies):
        self.copies, self.numbers = copies, [torch.tensor(1.0), torch.tensor(2.0)]

    def __getstate__(self):
        return {"numbers": [number.clone() if self.copies else number for number in self.numbers]}


def child(rank, holder):
    print("child:", sum(holder.numbers).item(), flush=True)


if __name__ == "__main__":
    for kind in ("copies", "held"):
        try:
            torch.multiprocessing.spawn(child, (Holder(kind == "copies"),))
            print(f"{kind}: no error", flush=True)
        except ValueError as error:
            print(f"{kind}: {type(error).__name__}: {error}", flush=True)
PYTHON
PYTHONPATH="$place/packages" python3 "$place/found.py" >"$place/seen" 2>"$place/errors" || { cat "$place/errors"; exit 1; }
cat "$place/seen"
sed -n 's/^#   //p' "$0" | diff - "$place/seen"
