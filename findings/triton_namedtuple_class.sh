#!/usr/bin/env bash
# Triton 3.9.0, with torch 2.13.0 on Python 3.11, no GPU needed. The same with Triton 3.6.0, 3.7.1 and 3.8.0.
#
# A NamedTuple class is a valid constexpr argument: a kernel that is given one compiles from an ASTSource, and a kernel
# may make a named tuple with it. Launched as `kernel[grid](...)`, the same kernel raises before anything is compiled:
# the launch's cache key walks over its arguments, asks of each whether it is a named tuple, and gets yes for the class,
# which it then iterates over. In a tl.constexpr the class passes. Triton 3.4.0 has no such walk and launches.
#
# Seen:
#   ASTSource: compiled
#   launch, the class: TypeError: 'type' object is not iterable
#   launch, the class in a constexpr: launched
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m pip install -q --target "$place/packages" torch==2.13.0 triton==3.9.0
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
from typing import NamedTuple

import driver  # noqa: F401
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Pair(NamedTuple):
    first: float
    second: float


@triton.jit
def kernel(x, PAIR: tl.constexpr):
    pair = PAIR(tl.load(x), tl.load(x + 1))
    tl.store(x, pair.first + pair.second)


source = ASTSource(kernel, {"x": "*fp32", "PAIR": "constexpr"}, {(1,): Pair})
triton.compile(source, target=GPUTarget("cuda", 90, 32))
print("ASTSource: compiled")
for name, given in (("the class", Pair), ("the class in a constexpr", tl.constexpr(Pair))):
    try:
        kernel[(1,)](torch.zeros(4), given)
        print(f"launch, {name}: launched")
    except TypeError as error:
        print(f"launch, {name}: TypeError: {error}")
PYTHON
seen=$(cd "$place" && TRITON_CACHE_DIR="$place/cache" PYTHONPATH="$place/packages:$place" python3 found.py)
expected="ASTSource: compiled
launch, the class: TypeError: 'type' object is not iterable
launch, the class in a constexpr: launched"
printf '%s\n' "$seen"
test "$seen" = "$expected" || { echo "this has changed" >&2; exit 1; }
