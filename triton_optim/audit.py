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
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

import triton_optim

from .audit_assembly import amdgcn_blocks, full_chunk_branch, sass_blocks
from .audit_compile import assembly, code_bytes, compile_kernel, ptx_functions, resources, wrapping_offsets
from .codecs import AVERAGE, STATE_CODES, Codec, codes, parameter_codec, plain, stochastic
from .kernels import multi_tensor
from .optimizer import RuleOptimizer
from .rows import row_for
from .triton_backend import TRITON_DTYPES, kept_as

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Kept(NamedTuple):
    """How the parameter, the gradient and each state are kept: their dtypes, as an optimizer's options say more."""

    parameter: torch.dtype
    gradient: torch.dtype
    state: torch.dtype
    param_precision: str = "storage"
    state_dtype: Any = None
    whole: bool = False  # the step takes a signal, which scales and clips, and keeps an average of the weights


_BF16 = (torch.bfloat16,) * 3
DTYPES = {
    "fp32": Kept(torch.float32, torch.float32, torch.float32),
    "bf16": Kept(*_BF16),
    "fp16": Kept(torch.float16, torch.float16, torch.float16),
    "fp64": Kept(torch.float64, torch.float64, torch.float64),
    "bf16+fp32": Kept(torch.bfloat16, torch.bfloat16, torch.float32),
    "bf16 stochastic": Kept(*_BF16, "stochastic", torch.bfloat16),
    "bf16 kahan": Kept(*_BF16, "kahan"),
    "bf16 split24": Kept(*_BF16, "split24"),
    "bf16 split32": Kept(*_BF16, "split32"),
    "bf16 master": Kept(*_BF16, "master"),
    "bf16 int8": Kept(*_BF16, "stochastic", "int8"),
    "bf16 int4": Kept(*_BF16, "stochastic", "int4"),
    "fp32 int8": Kept(torch.float32, torch.float32, torch.float32, state_dtype="int8"),
    "fp32 whole": Kept(torch.float32, torch.float32, torch.float32, whole=True),
}
# The others are made beside the rule, in the same way for every one, and so are misaligned addresses: a few rules stand
# for all, with no states and with one to three, signed and unsigned.
OF_EVERY_RULE = ("fp32", "bf16", "bf16 stochastic")
EXAMPLES = ("adamw", "adamw_amsgrad", "lion", "sgd")
MISALIGNED = "bf16"  # of the narrowest elements, so that any wider access shows


class Bound(NamedTuple):
    """What a compilation may come to: registers a thread at most, bits an access of the full-chunk branch at least."""

    registers: int = 64
    narrowest_bits: int = 128


# What misses the bounds of all other cases, by backend and dtypes.
BOUNDS = {
    # Each thread has 4 elements: one access of 128 bits a float32 role, and of 64 a bfloat16 role. With 8 elements, all
    # would be of 128, but the float32 stores would go through shared memory, in up to 88 registers.
    ("cuda", "bf16+fp32"): Bound(narrowest_bits=64),
    ("hip", "bf16+fp32"): Bound(narrowest_bits=64),
    # Rules of two means and a root take up to 78 at 8 elements a thread. 80 leave 24 warps an SM, which keep 60 KB of
    # loads in flight; memory needs 26 KB (4.3 TB/s for 0.8 us over 132 SMs).
    ("cuda", "bf16"): Bound(registers=80),
    ("cuda", "fp16"): Bound(registers=80),
    # The bits of 8 elements are in flight with them: up to 101 for amsgrad. 104 leave 16 warps an SM, 40 KB of loads.
    ("cuda", "bf16 stochastic"): Bound(registers=104),
    ("hip", "bf16 stochastic"): Bound(registers=80),
    # 8 elements a thread: bytes beside them come 64 bits at a time, and half bytes 32.
    ("cuda", "bf16 kahan"): Bound(registers=104),
    ("cuda", "bf16 split24"): Bound(registers=104, narrowest_bits=64),
    ("cuda", "bf16 split32"): Bound(registers=104, narrowest_bits=64),
    ("cuda", "bf16 master"): Bound(narrowest_bits=64),
    ("cuda", "bf16 int8"): Bound(registers=104, narrowest_bits=64),
    ("cuda", "bf16 int4"): Bound(registers=104, narrowest_bits=32),
    ("cuda", "fp32 int8"): Bound(registers=104, narrowest_bits=64),
    ("hip", "bf16 kahan"): Bound(registers=80),
    ("hip", "bf16 split24"): Bound(registers=80, narrowest_bits=64),
    ("hip", "bf16 split32"): Bound(registers=80, narrowest_bits=64),
    ("hip", "bf16 master"): Bound(narrowest_bits=64),
    ("hip", "bf16 int8"): Bound(registers=96, narrowest_bits=64),
    ("hip", "bf16 int4"): Bound(registers=96, narrowest_bits=32),
    ("hip", "fp32 int8"): Bound(registers=96, narrowest_bits=64),
    # Triton 3.6 takes 66 for amsgrad, 3.9 65 for nadam; up to 72 leave 7 of 8 waves.
    ("hip", "bf16"): Bound(registers=72),
    ("hip", "fp16"): Bound(registers=72),
}


class AuditedRule(NamedTuple):
    """A rule, the type of its scalars, and the optimizers that run it."""

    name: str
    rule: Any
    state_names: tuple[str, ...]
    scalars: type
    optimizers: tuple[str, ...]
    nonnegative: frozenset[str] = frozenset()


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
        rule, optimizers, dtypes, arch, aligned: what was compiled; not aligned is the bucket of misaligned addresses.
        roles: how each of p, g and the states is stored.
        block, num_warps: the launch shape.
        registers: a thread; on gfx942, vector registers.
        scalar_registers: a wave, on gfx942.
        spills: instructions that access the stack, and registers that AMD's compiler says it spilled.
        stack_bytes, shared_bytes: a thread, a program.
        loaded, stored: bytes an element that the full-chunk branch moves.
        floor_loaded, floor_stored: the fewest possible: each role is read once, and each but g written once.
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


@cache
def every_rule() -> tuple[AuditedRule, ...]:
    """The rules of all optimizers that the package exports, each once.

    Raises:
        ValueError: two rules have the same name.
    """
    optimizers: dict[str, RuleOptimizer] = {}
    for name in triton_optim.__all__:
        cls = getattr(triton_optim, name)
        if isinstance(cls, type) and issubclass(cls, RuleOptimizer) and cls.variants:
            optimizers[name] = cls([torch.zeros(1, 1, requires_grad=True)])  # type: ignore[call-arg]  # they have defaults
    # An optimizer's variants take the scalars of its default one, but one that is another optimizer's default, its.
    scalars = {name: type(row_for(opt, opt.param_groups[0], 1).h) for name, opt in optimizers.items()}
    by_default = {opt.variant(opt.param_groups[0]).rule: scalars[name] for name, opt in optimizers.items()}
    found: dict[str, AuditedRule] = {}
    for name, opt in optimizers.items():
        for rule, state_names, *_ in opt.variants:
            known = found.get(rule.__name__)
            if known is not None and (known.rule, known.state_names) != (rule, state_names):
                raise ValueError(
                    f"{name} and {known.optimizers[0]} have different rules named {known.name}: rename one"
                )
            users = (*(known.optimizers if known else ()), name)
            own = by_default.get(rule, scalars[name])
            unsigned = frozenset(opt.nonnegative)
            found[rule.__name__] = AuditedRule(rule.__name__, rule, state_names, own, users, unsigned)
    return tuple(found.values())


def role_codecs(rule: AuditedRule, dtypes: str) -> tuple[Codec, ...]:
    """How p and the states of `rule` are kept in ``DTYPES[dtypes]``."""
    kept = DTYPES[dtypes]
    group = {"param_precision": kept.param_precision}
    if kept.state_dtype in STATE_CODES:
        states = [codes(kept.state_dtype, name in rule.nonnegative) for name in rule.state_names]
    else:
        of_state = plain if kept.state_dtype is None else stochastic
        states = [of_state(kept.state)] * len(rule.state_names)
    average = [plain(torch.float32)] * kept.whole
    return (parameter_codec(group, kept.parameter), *states, *average)


def every_case(rules: Sequence[str] | None = None) -> list[Case]:
    """Rules in sets of dtypes for every target, and once for misaligned addresses.

    Args:
        rules: their names; None is every rule, of which only some stand for what is made beside them all.
    """
    cases = []
    for rule in every_rule():
        if rules is not None and rule.name not in rules:
            continue
        different: dict[Any, str] = {}  # without states, two of the sets are the same
        for dtypes, kept in DTYPES.items():
            if rules is not None or dtypes in OF_EVERY_RULE or rule.name in EXAMPLES:
                different.setdefault((role_codecs(rule, dtypes), kept.gradient), dtypes)
        cases += [Case(rule.name, dtypes, arch, True) for dtypes in different.values() for arch in TARGETS]
        if rules is not None or rule.name in EXAMPLES:
            cases += [Case(rule.name, MISALIGNED, arch, False) for arch in TARGETS]
    return cases


def audit(cases: Sequence[Case], processes: int | None = None) -> Iterator[Measurement]:
    """Measure `cases`, in their order, in so many `processes` (default: one a core, at most 8).

    Raises:
        RuntimeError: Triton's interpreter has replaced its compiler.
    """
    if not isinstance(multi_tensor.multi_tensor, JITFunction):
        raise RuntimeError(
            f"TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', '1')} puts an interpreter in the place of Triton's "
            "compiler, so there is nothing to audit. Run it without: env -u TRITON_INTERPRET triton-optim audit"
        )
    processes = min(processes or os.cpu_count() or 1, 8, len(cases))
    if processes < 2:
        yield from map(measure_case, cases)
        return
    # Not forked: torch may have threads by now.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(measure_case, cases, chunksize=2)


def measure_case(case: Case) -> Measurement:
    """Compile and measure one case."""
    rule = next(rule for rule in every_rule() if rule.name == case.rule)
    return measure(rule, case.dtypes, case.arch, case.aligned)


def measure(
    rule: AuditedRule, dtypes: str, arch: str, aligned: bool = True, kernel: ModuleType = multi_tensor
) -> Measurement:
    """Compile `rule` for ``TARGETS[arch]``, stored as ``DTYPES[dtypes]``, and measure it.

    Args:
        aligned: whether every address is a multiple of 16.
        kernel: the module of the multi-tensor kernel.

    Raises:
        ValueError: the full-chunk branch cannot be found in what was compiled.
    """
    target, codecs, gradient = TARGETS[arch], role_codecs(rule, dtypes), DTYPES[dtypes].gradient
    whole = DTYPES[dtypes].whole
    kept = kept_as(codecs, gradient, target.warp_size, kernel, whole) | {"SIGNAL": whole}
    compiled = compile_kernel(kernel, rule.rule, rule.scalars, DTYPES[dtypes].parameter, kept, target, aligned)
    blocks = (sass_blocks if target.backend == "cuda" else amdgcn_blocks)(assembly(compiled))
    instructions = [x for block in blocks for x in block.instructions]
    branch = full_chunk_branch(blocks)
    # A scale is read by each thread of its block, at one address, and written by one. Nothing else is as narrow.
    scales = [(codec.dtypes[-1].itemsize, codec.sharing) for codec in codecs if codec.sharing]
    accesses = [x for x in branch.accesses if x.moved not in {size for size, _ in scales}]
    widths = [8 * x.moved for x in accesses]
    elements = kernel.BLOCK / (kept["num_warps"] * target.warp_size)  # a thread
    of_scales = sum(size / sharing for size, sharing in scales)
    unread = codecs[0].dtypes[0].itemsize if codecs[0].name == "master" else 0
    floor = sum(codec.nbytes for codec in codecs)
    need = resources(compiled)
    return Measurement(
        rule=rule.name,
        optimizers=rule.optimizers,
        dtypes=dtypes,
        arch=arch,
        aligned=aligned,
        roles={
            role: "+".join(str(TRITON_DTYPES[dtype]) for dtype in codec.dtypes)
            for role, codec in zip(
                ("p", "g", *rule.state_names, *([AVERAGE] if whole else [])),
                (codecs[0], plain(gradient), *codecs[1:]),
                strict=True,
            )
        },
        block=kernel.BLOCK,
        num_warps=kept["num_warps"],
        registers=need.registers,
        scalar_registers=need.scalar_registers,
        spills=need.spilled + sum(x.local for x in instructions),
        stack_bytes=need.stack_bytes,
        shared_bytes=need.shared_bytes,
        loaded=sum(x.loaded for x in accesses) / elements + of_scales,
        stored=sum(x.stored for x in accesses) / elements + of_scales,
        floor_loaded=floor - unread + gradient.itemsize,
        floor_stored=floor,
        narrowest_bits=min(widths),
        widest_bits=max(widths),
        masked_accesses=sum(x.guarded for x in accesses),
        instructions=sum(x.opcode != "NOP" for x in branch.instructions) / elements,
        code_bytes=code_bytes(compiled, len(instructions)),
        wrapping_offsets=wrapping_offsets(compiled.asm["ttir"]),
        fp_fusion=kept.get("enable_fp_fusion"),
        ptx_functions=ptx_functions(compiled),
    )


def bound_of(m: Measurement) -> Bound:
    """What `m` may come to. Misaligned accesses are as narrow as an element."""
    bound = BOUNDS.get((TARGETS[m.arch].backend, m.dtypes), Bound())
    return (
        bound if m.aligned else bound._replace(narrowest_bits=8 * min(dtype.itemsize for dtype in DTYPES[m.dtypes][:3]))
    )


def problems(m: Measurement) -> list[str]:
    """What is wrong with `m`, in a phrase each."""
    registers, bits = bound_of(m)
    good = {
        f"{m.spills} spills, {m.stack_bytes} bytes of stack": m.spills == m.stack_bytes == 0,
        f"{m.registers} registers, over {registers}": m.registers <= registers,
        f"accesses of {m.narrowest_bits} bits, under {bits}": m.narrowest_bits >= bits,
        f"accesses of {m.widest_bits} bits to misaligned elements of {bits}": m.aligned or m.widest_bits <= bits,
        f"{m.masked_accesses} masked accesses in the full-chunk branch": m.masked_accesses == 0,
        f"{m.loaded:g} bytes an element loaded for a floor of {m.floor_loaded}": m.loaded == m.floor_loaded,
        f"{m.stored:g} bytes an element stored for a floor of {m.floor_stored}": m.stored == m.floor_stored,
        f"offsets of 32 bits: {', '.join(m.wrapping_offsets)}": not m.wrapping_offsets,
        "contraction to fused multiply-adds left to Triton's default": m.fp_fusion is not None,
    }
    return [problem for problem, passed in good.items() if not passed]
