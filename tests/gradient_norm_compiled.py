"""Compiles the kernels around the update, of the norm and of the rows, as launches would, for GPUs that need not be
there, and prints what came out as JSON: run by test_gradient_norm.py in a process of its own, as the interpreter takes
the compiler's place in this one.
"""

import json
import re

import torch
import triton
from triton.compiler import ASTSource

from triton_optim.audit.cases import TARGETS
from triton_optim.audit.compiling import resources, wrapping_offsets
from triton_optim.backends.triton.tables import TRITON_DTYPES
from triton_optim.kernels import gradient_norm as kernels
from triton_optim.kernels import rows as of_rows
from triton_optim.kernels.multi_tensor import BLOCK

NORM = {"chunks": "*i32", "tensors": "*i64", "gradients": "*i64", "partials": "*fp64", "count": "i32", "columns": "i32",
        "power": "*fp64"}  # fmt: skip
STATS = {"stats": "*fp64", "partials": "*fp64", "count": "i32", "max_norm": "*fp64", "grad_scale": "*fp32",
          "found_inf": "*fp32"}  # fmt: skip
ROWS = {"code": "*i32", "memory": "*i64", "rows": "*fp32", "keys": "*i32", **STATS}


def compiled(kernel, arguments, constants, options, target):
    order = [*arguments, *constants]
    source = ASTSource(
        fn=kernel,
        signature=arguments | dict.fromkeys(constants, "constexpr"),
        constexprs={(order.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, kind in enumerate(arguments.values()) if kind[0] == "*"},
    )
    return triton.compile(source, target=target, options=options)


def main() -> None:
    rows = []
    for arch, target in TARGETS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            options = kernels.launch_options(dtype.itemsize, target.warp_size)
            compute = TRITON_DTYPES[torch.float64 if dtype == torch.float64 else torch.float32]
            constants = {"KIND": "2", "DTYPE": TRITON_DTYPES[dtype], "COMPUTE": compute, "ALIGNED": True}
            got = compiled(kernels.partial_norms, NORM, constants, options, target)
            need, threads = resources(got), options["num_warps"] * target.warp_size
            # Without a mask: PTX puts a predicate before what has one; on AMD a mask is a branch.
            wide = r"\n\s*ld\.global\.v(4\.b32|2\.b64)" if "ptx" in got.asm else r"(buffer|global|flat)_load_dwordx4"
            rows.append(
                {
                    "kernel": "partial_norms",
                    "arch": arch,
                    "dtype": str(dtype),
                    "registers": need.registers,
                    "stack": need.stack_bytes,
                    "spilled": need.spilled,
                    "bytes": 16 * len(re.findall(wide, got.asm.get("ptx") or got.asm["amdgcn"])) * threads / BLOCK,
                    "itemsize": dtype.itemsize,
                    "wrapping": wrapping_offsets(got.asm["ttir"]),
                }
            )
        forms = {"KIND": "2", "SCALED": True, "FOUND": False, "SKIP": True, "BLOCK": 1024}
        options = {"num_warps": 256 // target.warp_size, "enable_fp_fusion": True}
        need = resources(compiled(kernels.gradient_stats, STATS, forms, options, target))
        figures = {"registers": need.registers, "stack": need.stack_bytes, "spilled": need.spilled}
        rows.append({"kernel": "gradient_stats", "arch": arch, **figures})
        constants = {"WIDTH": 10, "SLOTS": 64, "STATS": "form", "RANDOM": True, **forms, "KEPT": 2}
        options = {"num_warps": 4, "enable_fp_fusion": True}
        need = resources(compiled(of_rows.form_rows, ROWS, constants, options, target))
        figures = {"registers": need.registers, "stack": need.stack_bytes, "spilled": need.spilled}
        rows.append({"kernel": "form_rows", "arch": arch, **figures})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
