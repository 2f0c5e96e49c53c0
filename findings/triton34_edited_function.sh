#!/usr/bin/env bash
# Triton 3.4.0, with torch 2.13.0 on Python 3.11, no GPU needed. Triton 3.6.0 and later compile again.
#
# A kernel takes a @triton.jit function as a constexpr. The function is edited and its module loaded again, as in a
# notebook: it has another source and another hash, and the old name. Triton 3.4.0 launches the kernel that was compiled
# for the old one, since its in-memory key holds the function's module and name alone.
#
# Seen:
#   2 versions of the function, 1 kernel compiled
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install -q --target "$place/packages" torch==2.13.0 triton==3.4.0
cat >"$place/driver.py" <<'PYTHON'
"""A driver that loads and launches nothing: all of a launch but its end runs on a machine with no GPU."""
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched = []


class Utils:
    def load_binary(self, *given):
        return object(), object(), 32, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, x, y, z, stream, function, *rest):
        launched.append(function)


class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


driver.set_active(Driver())
PYTHON
cat >"$place/found.py" <<'PYTHON'
import importlib
import os
import pathlib
import sys

import driver
import torch
import triton
import triton.language as tl

TEXT = "import triton\n\n\n@triton.jit\ndef function(x):\n    return x + {}\n"


@triton.jit
def kernel(x, FUNCTION: tl.constexpr):
    tl.store(x, FUNCTION(tl.load(x)))


sys.dont_write_bytecode = True
file = pathlib.Path("edited.py")
hashes = set()
for number in (1, 2):
    file.write_text(TEXT.format(number))
    importlib.invalidate_caches()
    sys.modules.pop("edited", None)
    importlib.import_module("linecache").clearcache()
    function = importlib.import_module("edited").function
    hashes.add(function.cache_key)
    kernel[(1,)](torch.zeros(4), function)
print(f"{len(hashes)} versions of the function, {len(set(driver.launched))} kernel compiled")
PYTHON
seen=$(cd "$place" && TRITON_CACHE_DIR="$place/cache" PYTHONPATH="$place/packages:$place" python3 found.py)
expected="2 versions of the function, 1 kernel compiled"
printf '%s\n' "$seen"
test "$seen" = "$expected" || { echo "this has changed" >&2; exit 1; }
