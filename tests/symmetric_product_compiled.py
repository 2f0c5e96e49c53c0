"""Compiles the symmetric product as a launch would, for GPUs that need not be there, and prints what came out as JSON.

Run by test_symmetric_product_code.py in a process of its own, where Triton compiles and does not interpret.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from triton_optim.audit.assembly import amdgcn_blocks, sass_blocks
from triton_optim.audit.cases import TARGETS
from triton_optim.audit.compiling import listings, resources
from triton_optim.backends.triton import launch as triton_launch
from triton_optim.kernels import symmetric_product as kernel
from triton_optim.optimizers.matrix import symmetric_product

# The dtype and how float32 is multiplied; whether the rows or the columns of x are contiguous; the sizes M and K.
CASES = {
    "bf16": (torch.bfloat16, "ieee", "rows", 768, 3072),
    "fp16 transposed": (torch.float16, "ieee", "columns", 1024, 4096),
    "tf32": (torch.float32, "tf32", "rows", 768, 3072),
    "fp32": (torch.float32, "ieee", "rows", 768, 3072),
    "bf16 odd": (torch.bfloat16, "ieee", "rows", 1001, 1003),
}
MULTIPLICATIONS = r"\b(?:(?:HMMA|HGMMA|UTC\w*MMA)[\w.]*|FFMA2?|v_mfma_\w+)"
ACCESSES = r"\b(LDG|STG|LDGSTS)\b((?:\.\w+)*)|\b(?:buffer|global)_(load|store)_(\w+)"
AMD_BITS = {"dwordx4": 128, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}


class Driver:
    """What Triton asks of a driver before it launches: here, for another GPU than this machine's."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


def build(case: str, arch: str) -> Any:
    """The compiled kernel."""
    dtype, precision, contiguous, m, k = CASES[case]
    target = TARGETS[arch]
    driver.set_active(Driver(target))
    compiled: list[Any] = []
    triton_launch.warp_size = lambda device: target.warp_size
    symmetric_product.float32_precision = lambda device: precision
    symmetric_product.launch = lambda programs, arguments, options: compiled.append(
        kernel.symmetric_product.warmup(*arguments, grid=(programs,), **options)
    )
    x = torch.empty((4, m, k) if contiguous == "rows" else (4, k, m), dtype=dtype, device="meta")
    out, c = (torch.empty(4, m, m, dtype=dtype, device="meta") for _ in range(2))
    x = x if contiguous == "rows" else x.mT
    symmetric_product._run_kernel(x, x, 2.0, 0.5, c, out)
    return compiled[0]


def measure(case: str, arch: str, compiled: Any, text: str) -> dict[str, Any]:
    blocks = (sass_blocks if TARGETS[arch].backend == "cuda" else amdgcn_blocks)(text)
    need = resources(compiled)
    bits: dict[str, set[int]] = {"load": set(), "async": set(), "store": set()}
    for name, modifiers, direction, what in re.findall(ACCESSES, text):
        kind = direction or {"LDG": "load", "LDGSTS": "async", "STG": "store"}[name]
        own = [16 if word == "U16" else int(word) for word in modifiers.split(".") if word in ("128", "64", "U16")]
        bits[kind].add(AMD_BITS[what] if direction else own[0] if own else 32)
    ttir = compiled.asm["ttir"]
    return {
        "case": case,
        "arch": arch,
        "registers": need.registers,
        "spilled": need.spilled,
        "stack": need.stack_bytes + sum(x.local for block in blocks for x in block.instructions),
        "shared": need.shared_bytes,
        "multiplications": sorted(set(re.findall(MULTIPLICATIONS, text))),
        "bits": {kind: sorted(found) for kind, found in bits.items()},
        # The widths of the offsets that are added to pointers, and of every product.
        "offsets": sorted(set(re.findall(r"tt\.addptr .*?, (?:tensor<[\dx]+x)?(i\d+)>? loc", ttir))),
        "products": sorted(re.findall(r"arith\.muli .*?: (?:tensor<[\dx]+x)?(i\d+)>? loc", ttir)),
    }


def wanted(case: str, arch: str) -> bool:
    """One of NVIDIA's stands for all in the cases that stand for others; on AMD no launch asks for TensorFloat-32."""
    return arch != "gfx942" if case == "tf32" else case == "bf16" or arch in ("sm_90", "gfx942")


if __name__ == "__main__":
    cases = [(case, arch) for case in CASES for arch in TARGETS if wanted(case, arch)]
    built = [build(*case) for case in cases]
    read = zip(cases, built, listings(built), strict=True)
    print(json.dumps([measure(*case, compiled, text) for case, compiled, text in read]))
