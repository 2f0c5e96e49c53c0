"""Compiles every rule for GPUs that need not be there, and measures what comes out.

The speed of an optimizer is the bytes it moves, so it can be audited without a GPU: how many bytes an element are
loaded and stored beside the fewest possible, by accesses of which width, with how many registers and instructions.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import re
import subprocess
import tempfile
from ast import Call, Constant, parse, walk
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

import triton_optim

from .audit_assembly import amdgcn_blocks, branch_of_call, sass_blocks, wrapping_offsets
from .kernels import multi_tensor
from .optimizer import RuleOptimizer
from .triton_backend import TRITON_DTYPES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# How the parameter, the gradient and the states are stored.
DTYPES = {
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16, torch.float16),
    "fp64": (torch.float64, torch.float64, torch.float64),
    "bf16+fp32": (torch.bfloat16, torch.bfloat16, torch.float32),
}
MISALIGNED = "bf16"  # the narrowest: any access wider than its element shows

FULL_WIDTH = 128  # bits, the widest access of a thread


class AuditedRule(NamedTuple):
    """A rule, the type of its scalars and the optimizers that run it."""

    name: str
    rule: Any
    state_names: tuple[str, ...]
    scalars: type
    optimizers: tuple[str, ...]

    @property
    def roles(self) -> tuple[str, ...]:
        return ("p", "g", *self.state_names)


class Case(NamedTuple):
    """One compilation, in words that another process can look up."""

    rule: str
    dtypes: str
    arch: str
    aligned: bool


@dataclass(frozen=True)
class Measurement:
    """What one compilation came to.

    Attributes:
        rule, optimizers, dtypes, arch, aligned: what was compiled. Not aligned is the bucket of misaligned addresses.
        roles: how each of p, g and the states is stored.
        block, num_warps: the launch shape.
        registers: a thread; on gfx942, vector registers.
        scalar_registers: a wave, on gfx942.
        spills: instructions that move a register to or from the stack on NVIDIA, registers spilled on AMD.
        stack_bytes, shared_bytes: a thread, a program.
        loaded, stored: bytes an element that the full-chunk branch moves; floor_loaded, floor_stored: the fewest
            possible, each role read once and each but g written once.
        narrowest_bits, widest_bits: of the accesses of the full-chunk branch.
        masked_accesses: how many accesses of the full-chunk branch a predicate may skip; 0 or it is not that branch.
        instructions: an element, in the full-chunk branch; subroutines that it calls are not counted.
        code_bytes: the whole kernel.
        wrapping_offsets: values in the IR that may wrap at 2^31 elements.
        fp_fusion: what the launch says of contracting to fused multiply-adds; None if it leaves this to Triton.
        special_functions: PTX instructions for divisions, roots and the like, which may be inexact.
    """

    rule: str
    optimizers: tuple[str, ...]
    dtypes: str
    arch: str
    aligned: bool
    roles: dict[str, str]
    block: int
    num_warps: int
    registers: int
    scalar_registers: int | None
    spills: int
    stack_bytes: int
    shared_bytes: int
    loaded: float
    stored: float
    floor_loaded: int
    floor_stored: int
    narrowest_bits: int
    widest_bits: int
    masked_accesses: int
    instructions: float
    code_bytes: int
    wrapping_offsets: list[str]
    fp_fusion: bool | None
    special_functions: list[str]


@cache
def every_rule() -> tuple[AuditedRule, ...]:
    """The rules of all optimizers that the package exports, each once."""
    found: dict[tuple[Any, tuple[str, ...]], AuditedRule] = {}
    for name in triton_optim.__all__:
        cls = getattr(triton_optim, name)
        if not (isinstance(cls, type) and issubclass(cls, RuleOptimizer) and cls.variants):
            continue
        opt: Any = cls([torch.zeros(1, requires_grad=True)])  # type: ignore[call-arg]  # a subclass has defaults
        scalars = type(opt.scalars(opt.param_groups[0], 1.0))
        for variant in cls.variants:
            known = found.get((variant.rule, variant.state_names))
            optimizers = (*(known.optimizers if known else ()), name)
            rule = AuditedRule(variant.rule.__name__, variant.rule, variant.state_names, scalars, optimizers)
            found[variant.rule, variant.state_names] = rule
    return tuple(found.values())


def every_case() -> list[Case]:
    """Every rule with every set of dtypes for every target, and once for misaligned addresses."""
    cases = []
    for rule in every_rule():
        sets = {tuple(_role_dtypes(rule, name)): name for name in reversed(DTYPES)}  # without states, some are equal
        for dtypes in filter(set(sets.values()).__contains__, DTYPES):
            cases += [Case(rule.name, dtypes, arch, True) for arch in TARGETS]
        cases += [Case(rule.name, MISALIGNED, arch, False) for arch in TARGETS]
    return cases


def audit(cases: Sequence[Case], processes: int | None = None) -> Iterator[Measurement]:
    """Measure `cases`, in their order, in so many `processes` (default: one a core that this process may use).

    Raises:
        RuntimeError: this process has Triton's interpreter in the place of its compiler.
    """
    if not isinstance(multi_tensor.multi_tensor, JITFunction):
        raise RuntimeError(
            f"TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', '1')} replaces Triton's compiler by its interpreter, "
            "so there is nothing to audit. Unset it: env -u TRITON_INTERPRET triton-optim audit"
        )
    processes = min(processes or len(os.sched_getaffinity(0)), len(cases))
    if processes < 2:
        yield from map(measure_case, cases)
        return
    # Not forked: torch may have started threads.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(measure_case, cases, chunksize=4)


def measure_case(case: Case) -> Measurement:
    """Compile and measure one case."""
    rule = next(rule for rule in every_rule() if rule.name == case.rule)
    return measure(rule, case.dtypes, case.arch, case.aligned)


def measure(
    rule: AuditedRule, dtypes: str, arch: str, aligned: bool = True, kernel: ModuleType = multi_tensor
) -> Measurement:
    """Compile `rule` for `arch`, stored as ``DTYPES[dtypes]``, and measure it.

    Args:
        kernel: the module with the multi-tensor kernel.

    Raises:
        ValueError: the full-chunk branch cannot be found in what was compiled.
    """
    target, options = TARGETS[arch], launch_options(kernel)
    compiled = _compile(rule, dtypes, target, options, aligned, kernel)
    stored_as = _role_dtypes(rule, dtypes)
    file = Path(inspect.getsourcefile(kernel) or "").name
    on_nvidia = target.backend == "cuda"
    assembly = _disassembled(compiled.asm["cubin"]) if on_nvidia else compiled.asm["amdgcn"]
    blocks = sass_blocks(assembly, file) if on_nvidia else amdgcn_blocks(assembly, file)
    branch = branch_of_call(blocks, unmasked_call(kernel))
    elements = kernel.BLOCK / (options["num_warps"] * target.warp_size)  # a thread
    resources = _nvidia_resources(compiled, blocks) if on_nvidia else _amd_resources(assembly)
    sizes = [dtype.itemsize for dtype in stored_as]
    return Measurement(
        rule=rule.name,
        optimizers=rule.optimizers,
        dtypes=dtypes,
        arch=arch,
        aligned=aligned,
        roles={role: str(TRITON_DTYPES[dtype]) for role, dtype in zip(rule.roles, stored_as, strict=True)},
        block=kernel.BLOCK,
        num_warps=options["num_warps"],
        **resources,
        shared_bytes=compiled.metadata.shared,
        loaded=sum(x.loaded for x in branch.accesses) / elements,
        stored=sum(x.stored for x in branch.accesses) / elements,
        floor_loaded=sum(sizes),
        floor_stored=sum(sizes) - sizes[1],
        narrowest_bits=8 * min(x.loaded + x.stored for x in branch.accesses),
        widest_bits=8 * max(x.loaded + x.stored for x in branch.accesses),
        masked_accesses=sum(x.guarded for x in branch.accesses),
        instructions=sum(x.opcode != "NOP" for x in branch.instructions) / elements,
        wrapping_offsets=wrapping_offsets(compiled.asm["ttir"]),
        fp_fusion=options.get("enable_fp_fusion"),
        special_functions=sorted(set(re.findall(r"\b(?:div|r?sqrt|rcp|ex2|lg2|sin|cos|tanh)\.\w[.\w]*", compiled.asm["ptx"])))
        if on_nvidia
        else [],
    )


def launch_options(kernel: ModuleType = multi_tensor) -> dict[str, Any]:
    """What the Triton backend passes beside the kernel's arguments."""
    return {"num_warps": kernel.NUM_WARPS, "enable_fp_fusion": True}


def unmasked_call(kernel: ModuleType = multi_tensor) -> int:
    """The line of the kernel's file with the call of its full-chunk branch: the one whose mask is None."""
    lines, first = inspect.getsourcelines(kernel.multi_tensor.fn)
    calls = [node for node in walk(parse("".join(lines))) if isinstance(node, Call)]
    unmasked = [call for call in calls if any(isinstance(a, Constant) and a.value is None for a in call.args)]
    if len(unmasked) != 1:
        raise ValueError(f"the kernel has {len(unmasked)} calls with None as an argument; the audit needs exactly one")
    return first + unmasked[0].lineno - 1


def _role_dtypes(rule: AuditedRule, name: str) -> list[torch.dtype]:
    parameter, gradient, state = DTYPES[name]
    return [parameter, gradient, *[state] * len(rule.state_names)]


def _compile(
    rule: AuditedRule, dtypes: str, target: GPUTarget, options: dict[str, Any], aligned: bool, kernel: ModuleType
) -> Any:
    stored_as = _role_dtypes(rule, dtypes)
    compute = TRITON_DTYPES[torch.float64 if stored_as[0] == torch.float64 else torch.float32]
    constants = {
        "RULE": rule.rule,
        "SCALARS": rule.scalars,
        "FIELDS": rule.scalars._fields,  # type: ignore[attr-defined]
        "DTYPES": tuple(TRITON_DTYPES[dtype] for dtype in stored_as),
        "COMPUTE": compute,
        "CONVERT": kernel.convert,
        "BLOCK": kernel.BLOCK,
        "ALIGNED": aligned,
    }
    signature = {"chunks": "*i32", "tensors": "*i64", "gradients": "*i64", "rows": f"*{compute}"}
    tables = len(signature)
    signature |= dict.fromkeys(constants, "constexpr")
    order = list(signature)
    source = ASTSource(
        fn=kernel.multi_tensor,
        signature=signature,
        constexprs={(order.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(tables)},  # torch's allocations are
    )
    return triton.compile(source, target=target, options=options)


def _run_on_cubin(tool: str, arguments: Iterable[str], cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = getattr(triton.knobs.nvidia, tool).path
        return subprocess.run([path, *arguments, file.name], capture_output=True, text=True, check=True).stdout


def _disassembled(cubin: bytes) -> str:
    # Data-flow analysis (of the branch stack, which this kernel does not use) takes a third of the tool's time.
    return _run_on_cubin("nvdisasm", ["-c", "-gi", "-ndf"], cubin)


def _nvidia_resources(compiled: Any, blocks: list[Any]) -> dict[str, Any]:
    usage = _run_on_cubin("cuobjdump", ["--dump-resource-usage"], compiled.asm["cubin"])
    instructions = [x for block in blocks for x in block.instructions]
    return {
        "registers": _number(r"\bREG:(\d+)", usage),
        "scalar_registers": None,
        "spills": sum(x.local for x in instructions),
        "stack_bytes": _number(r"\bSTACK:(\d+)", usage) + _number(r"\bLOCAL:(\d+)", usage),
        "code_bytes": 16 * len(instructions),
    }


def _amd_resources(assembly: str) -> dict[str, Any]:
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", assembly),
        "scalar_registers": _number(r"\.sgpr_count:\s+(\d+)", assembly),
        "spills": sum(_number(rf"\.{kind}gpr_spill_count:\s+(\d+)", assembly) for kind in "vs"),
        "stack_bytes": _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        "code_bytes": _number(r"; codeLenInByte = (\d+)", assembly),
    }


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{pattern} is not in what was compiled: this Triton writes it otherwise than the audit knows")
    return int(match[1])
