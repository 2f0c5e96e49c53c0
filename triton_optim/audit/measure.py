"""Compiles every rule for GPUs that need not be there, and measures what comes out.

The time of an optimizer's step is the time to move its bytes, so much of its speed shows without a GPU: how many bytes
an element are moved beside the fewest possible, by accesses of which width, with how many registers and instructions.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import torch
from triton.runtime import JITFunction

from ..backends.triton.measure import measure_constants
from ..backends.triton.tables import TRITON_DTYPES, kept_as
from ..kernels import measure, multi_tensor
from .assembly import amdgcn_blocks, full_chunk_branch, sass_blocks
from .cases import DTYPES, TARGETS, AuditedRule, Case, every_rule, role_codecs, roles_of
from .compiling import code_bytes, compile_kernel, compile_update, listings, ptx_functions, resources, wrapping_offsets

# Cases that a process reads together, at most: the tool takes as long to start as to read fifty. And as few of them
# take less long than a process to start.
BATCH, FEW = 64, 24


@dataclass(frozen=True)
class Measurement:
    """What one compilation came to.

    Attributes:
        rule, optimizers, dtypes, arch, aligned: what was compiled; not aligned is the bucket of misaligned addresses.
        roles: how each of p, g and the states is stored; of what is summed, those that are read.
        sums: whether it is summed, and nothing written but a number a chunk.
        block, num_warps: the launch shape.
        registers: a thread; on gfx942, vector registers.
        scalar_registers: a wave, on gfx942.
        spills: instructions that access the stack, and registers that AMD's compiler says it spilled.
        stack_bytes, shared_bytes: a thread, a program.
        loaded, stored: bytes an element that the full-chunk branch moves.
        floor_loaded, floor_stored: the fewest possible: each role is read once, and each but g written once, if any is.
        narrowest_bits, widest_bits: of the accesses of the full-chunk branch.
        masked_accesses: how many of these a predicate may skip, on NVIDIA (a mask shows in no access on AMD).
        instructions: an element, in the full-chunk branch, without the subroutines that it calls.
        code_bytes: the whole kernel.
        wrapping_offsets: values in the IR that may wrap at 2^31 elements.
        fp_fusion: what the launch says of contraction to fused multiply-adds; None leaves it to Triton's default.
        ptx_functions: for divisions, roots and the like, some of them inexact; empty on AMD.
    """

    rule: str
    optimizers: tuple[str, ...]
    dtypes: str
    arch: str
    aligned: bool
    roles: dict[str, str]
    sums: bool
    block: int
    num_warps: int
    registers: int
    scalar_registers: int | None
    spills: int
    stack_bytes: int
    shared_bytes: int
    loaded: float
    stored: float
    floor_loaded: float
    floor_stored: float
    narrowest_bits: int
    widest_bits: int
    masked_accesses: int
    instructions: float
    code_bytes: int
    wrapping_offsets: list[str]
    fp_fusion: bool | None
    ptx_functions: list[str]


def audit(cases: Sequence[Case]) -> Iterator[Measurement]:
    """Measure `cases`, in their order, by as many processes as there are cores, 8 at most.

    Raises:
        RuntimeError: Triton's interpreter has replaced its compiler.
    """
    if not isinstance(multi_tensor.multi_tensor, JITFunction):
        raise RuntimeError(
            f"TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', '1')} puts an interpreter in the place of Triton's "
            "compiler, so there is nothing to audit. Run it without: env -u TRITON_INTERPRET triton-optim audit"
        )
    processes = min(os.cpu_count() or 1, 8, -(-len(cases) // FEW))
    size = min(BATCH, -(-len(cases) // max(processes, 1)))
    batches = [cases[i : i + size] for i in range(0, len(cases), size)]
    if processes < 2:
        yield from chain.from_iterable(map(measure_cases, batches))
        return
    # Not forked: torch may have threads by now.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from chain.from_iterable(pool.map(measure_cases, batches))


def measure_cases(cases: Sequence[Case]) -> list[Measurement]:
    """Compile and measure some."""
    rules = {rule.name: rule for rule in every_rule()}
    return read([build(rules[case.rule], case.dtypes, case.arch, case.aligned) for case in cases])


class Built(NamedTuple):
    """A compiled case that is not yet read: what :func:`build` was given, and what it made."""

    rule: AuditedRule
    case: Case
    kernel: ModuleType
    kept: dict[str, Any]
    compiled: Any


def build(rule: AuditedRule, dtypes: str, arch: str, aligned: bool = True, kernel: ModuleType = multi_tensor) -> Built:
    """Compile `rule` for ``TARGETS[arch]``, stored as ``DTYPES[dtypes]``.

    Args:
        aligned: whether every address is a multiple of 16.
        kernel: the module of the multi-tensor kernel.
    """
    target, (parameter, gradient, *_), whole = TARGETS[arch], DTYPES[dtypes], DTYPES[dtypes].whole
    case, codecs = Case(rule.name, dtypes, arch, aligned), role_codecs(rule, dtypes)
    if rule.sums:
        compute = torch.float64 if parameter == torch.float64 else torch.float32
        kept = measure_constants(rule.rule, rule.scalars, codecs, gradient, compute, target.warp_size)
        kept |= {"SCALARS": rule.scalars, "ALIGNED": aligned, "SOURCE": ""}
        tables = {"chunks": "*i32", "tensors": "*i64", "gradients": "*i64", "rows": f"*{TRITON_DTYPES[compute]}"}
        compiled = compile_kernel(measure.measure, tables | {"chunk_sums": "*fp64"}, kept, target)
    else:
        kept = kept_as(codecs, gradient, target.warp_size, kernel, whole) | {"STATS": whole}
        compiled = compile_update(kernel, rule.rule, rule.scalars, parameter, kept, target, aligned)
    return Built(rule, case, kernel, kept, compiled)


def read(built: Sequence[Built]) -> list[Measurement]:
    """Measure what was compiled.

    Raises:
        ValueError: the full-chunk branch cannot be found in what was compiled.
    """
    return [_measurement(one, text) for one, text in zip(built, listings([one.compiled for one in built]), strict=True)]


def _measurement(built: Built, listing: str) -> Measurement:
    rule, (_, dtypes, arch, aligned), kernel, kept, compiled = built
    target, roles = TARGETS[arch], roles_of(rule, dtypes)
    blocks = (sass_blocks if target.backend == "cuda" else amdgcn_blocks)(listing)
    instructions = [x for block in blocks for x in block.instructions]
    branch = full_chunk_branch(blocks)
    # A scale is read by each thread of its block, at one address, and written by one. Nothing else is as narrow.
    scales = [(codec.dtypes[-1].itemsize, codec.block_size) for codec in roles.values() if codec.block_size]
    accesses = [x for x in branch.accesses if x.moved not in {size for size, _ in scales}]
    if rule.sums:  # what is written is a number a chunk
        accesses = [x for x in accesses if x.loaded]
    widths = [8 * x.moved for x in accesses]
    elements = kernel.BLOCK / (kept["num_warps"] * target.warp_size)  # a thread
    of_scales = sum(size / block_size for size, block_size in scales)
    need = resources(compiled)
    loaded, stored = floor(rule, dtypes)
    return Measurement(
        rule=rule.name,
        optimizers=rule.optimizers,
        dtypes=dtypes,
        arch=arch,
        aligned=aligned,
        roles={role: "+".join(str(TRITON_DTYPES[dtype]) for dtype in codec.dtypes) for role, codec in roles.items()},
        sums=rule.sums,
        block=kernel.BLOCK,
        num_warps=kept["num_warps"],
        registers=need.registers,
        scalar_registers=need.scalar_registers,
        spills=need.spilled + sum(x.local for x in instructions),
        stack_bytes=need.stack_bytes,
        shared_bytes=need.shared_bytes,
        loaded=sum(x.loaded for x in accesses) / elements + of_scales,
        stored=sum(x.stored for x in accesses) / elements + of_scales * (not rule.sums),
        floor_loaded=loaded,
        floor_stored=stored,
        narrowest_bits=min(widths),
        widest_bits=max(widths),
        masked_accesses=sum(x.guarded for x in accesses),
        instructions=sum(x.opcode != "NOP" for x in branch.instructions) / elements,
        code_bytes=code_bytes(compiled, len(instructions)),
        wrapping_offsets=wrapping_offsets(compiled.asm["ttir"]),
        fp_fusion=kept.get("enable_fp_fusion"),
        ptx_functions=ptx_functions(compiled),
    )


def floor(rule: AuditedRule, dtypes: str) -> tuple[float, float]:
    """The fewest bytes an element that are read and written."""
    roles = roles_of(rule, dtypes)
    read = sum(codec.nbytes if role == "g" else codec.nbytes_read for role, codec in roles.items())
    return read, 0.0 if rule.sums else sum(codec.nbytes for role, codec in roles.items() if role != "g")
