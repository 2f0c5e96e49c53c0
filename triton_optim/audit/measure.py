"""Compiles every rule for GPUs that need not be there, and measures what comes out.

The time of an optimizer's step is the time to move its bytes, so much of its speed shows without a GPU: how many bytes
an element are moved beside the fewest possible, by accesses of which width, with how many registers and instructions.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from ..backends.triton.measure import measure_constants
from ..backends.triton.tables import TRITON_DTYPES, kept_as
from ..buckets.step_scalars import step_scalars_for
from ..core.optimizer import RuleOptimizer
from ..kernels import measure, multi_tensor
from ..kernels.source import python_function, source_of
from ..kernels.straight import roles_read, straight
from ..precision.codecs import STATE_CODES, Codec, codes, parameter_codec, plain, stochastic
from ..registry import rule_optimizers
from ..spec import AVERAGE, State
from .assembly import amdgcn_blocks, full_chunk_branch, sass_blocks
from .compiling import (
    code_bytes,
    compile_kernel,
    compile_update,
    listings,
    ptx_functions,
    resources,
    wrapping_offsets,
)

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
    whole: bool = False  # the step takes stats, which scales and clips, and keeps an average of the weights


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
# What every rule is compiled as, and for which targets: two or one stand for all where more would say the same again.
OF_EVERY_RULE: dict[str, tuple[str, ...]] = {
    "fp32": tuple(TARGETS),
    "bf16": ("sm_90",),
    "bf16 stochastic": ("sm_90", "gfx942"),
}
# And where less is to do: for a GPU of either maker, and where most registers are in flight if states are many. Of the
# rules with as many states one is compiled as above, that with the most divisions and roots.
QUICKLY: dict[str, tuple[str, ...]] = {"fp32": ("sm_90", "gfx942")}
QUICKLY_OF_MANY: dict[str, tuple[str, ...]] = {"bf16 stochastic": ("sm_90",)}
MANY = 3  # states
# How values are kept is made beside the rule, in the same way for every one, and so are misaligned addresses: two rules
# stand for all, each with signed and unsigned states, the second with the most, and one sum for all sums.
IN_EVERY_WAY: dict[str, tuple[str, ...]] = {
    "adamw": tuple(TARGETS),
    "adamw_amsgrad": ("sm_90", "gfx942"),
    "lamb_norms": ("sm_90",),
}
IN_EVERY_WAY_QUICKLY = IN_EVERY_WAY | {
    "adamw": ("sm_80", "sm_100")
}  # where the other says no more, which has more states
# Cases that a process reads together, at most: the tool takes as long to start as to read fifty. And as few of them
# take less long than a process to start.
BATCH, FEW = 64, 24
MISALIGNED = "bf16"  # of the narrowest elements, so that any wider access shows


class AuditedRule(NamedTuple):
    """A rule, or what an optimizer sums over each parameter before the rule runs.

    Attributes:
        name, rule: its.
        states: those that it takes, in its order.
        scalars: the type of its scalars.
        optimizers: those that run it.
        measure: the name of what may be summed before; empty if nothing is.
        sums: whether it is summed, and nothing written.
        words: over what it is summed, and its docstring.
    """

    name: str
    rule: Any
    states: tuple[State, ...]
    scalars: type
    optimizers: tuple[str, ...]
    measure: str = ""
    sums: bool = False
    words: str = ""

    @property
    def effort(self) -> tuple[int, int]:
        """Divisions and roots, which take the most registers, and how long it is."""
        nodes = [*ast.walk(source_of(python_function(self.rule))[0])]
        hard = sum(isinstance(x, ast.Div) or getattr(x, "id", "") in ("sqrt", "exp", "log") for x in nodes)
        return hard, len(nodes)


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


@cache
def every_rule() -> tuple[AuditedRule, ...]:
    """The rules of all optimizers that the package exports, and what they sum before, each once.

    Raises:
        ValueError: two rules have the same name.
    """
    p, classes = torch.zeros(1, 1, device="cpu", requires_grad=True), rule_optimizers().values()
    optimizers: dict[str, RuleOptimizer] = {cls.__name__: cls([p]) for cls in classes}  # type: ignore[call-arg]
    # An optimizer's variants take the scalars of its default one, but one that is another optimizer's default, its.
    scalars = {name: type(step_scalars_for(opt, opt.param_groups[0], 1).h) for name, opt in optimizers.items()}
    by_default = {opt.running_variant(opt.param_groups[0]).rule: scalars[name] for name, opt in optimizers.items()}
    found: dict[str, AuditedRule] = {}
    for name, opt in optimizers.items():
        for variant in opt.variants:
            rule, own = straight(variant.rule), by_default.get(straight(variant.rule), scalars[name])
            new = AuditedRule(rule.__name__, rule, variant.states, own, (name,))
            if variant.measure is not None:
                summed, words = straight(variant.measure), python_function(variant.measure).__doc__ or ""
                words = f"over {'the model' if opt.needs_all else 'each parameter'}: {words.strip()}"
                add(found, new._replace(name=summed.__name__, rule=summed, sums=True, words=words))
                new = new._replace(measure=summed.__name__)
            add(found, new)
    return tuple(found.values())


def add(found: dict[str, AuditedRule], new: AuditedRule) -> None:
    """Note a rule of an optimizer, or that one that is known is of this one, too."""
    known = found.get(new.name, new)
    new = new._replace(measure=new.measure or known.measure)  # a variant may have none
    users = tuple(dict.fromkeys((*(known.optimizers if new.name in found else ()), *new.optimizers)))
    if known._replace(optimizers=users, measure=known.measure or new.measure) != new._replace(optimizers=users):
        raise ValueError(f"{' and '.join(users)} have different rules named {new.name}: rename one")
    found[new.name] = new._replace(optimizers=users)


def role_codecs(rule: AuditedRule, dtypes: str) -> tuple[Codec, ...]:
    """How p and the states of `rule` are kept in ``DTYPES[dtypes]``."""
    kept = DTYPES[dtypes]
    group = {"param_precision": kept.param_precision}
    of_state = plain if kept.state_dtype is None else stochastic
    states = [
        (codes(kept.state_dtype, state.nonnegative) if state.quantized else plain(torch.float32))
        if kept.state_dtype in STATE_CODES
        else of_state(kept.state)
        for state in rule.states
    ]
    average = [plain(torch.float32)] * (kept.whole and not rule.sums)  # which is not summed
    return (parameter_codec(group, kept.parameter), *states, *average)


def every_case(rules: Sequence[str] | None = None, quick: bool = False) -> list[Case]:
    """Rules in sets of dtypes for targets, and for misaligned addresses; what is summed before one, with it.

    Args:
        rules: their names, each in every set for every target; None is every rule, of which some stand for others.
        quick: whether fewer do.
    """
    known = every_rule()
    of_rules = [rule for rule in known if not rule.sums]
    hardest = {len(rule.states): rule.name for rule in sorted(of_rules, key=lambda rule: rule.effort)}.values()

    def targets_of(rule: AuditedRule, dtypes: str | None) -> list[str]:
        if rules is not None:
            return [*TARGETS]
        of_every: dict[str, tuple[str, ...]] = OF_EVERY_RULE
        if quick and rule.name not in hardest:
            of_every = QUICKLY | (QUICKLY_OF_MANY if len(rule.states) >= MANY and not rule.sums else {})
        in_every_way = IN_EVERY_WAY_QUICKLY if quick else IN_EVERY_WAY
        chosen = (*in_every_way.get(rule.name, ()), *of_every.get(dtypes or "", ()))
        return [arch for arch in TARGETS if arch in chosen]

    named = {*(rules or ()), *(rule.measure for rule in known if rules is not None and rule.name in rules)}
    cases = []
    for rule in known:
        if rules is not None and rule.name not in named:
            continue
        different: dict[Any, str] = {}  # without states, two of the sets are the same
        for dtypes, kept in DTYPES.items():
            different.setdefault((role_codecs(rule, dtypes), kept.gradient), dtypes)
        cases += [Case(rule.name, d, arch, True) for d in different.values() for arch in targets_of(rule, d)]
        cases += [Case(rule.name, MISALIGNED, arch, False) for arch in targets_of(rule, None)]
    return cases


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


def roles_of(rule: AuditedRule, dtypes: str) -> dict[str, Codec]:
    """How each of p, g and the states is kept; of what is summed, those that are read."""
    parameter, *states = role_codecs(rule, dtypes)
    names = ("p", "g", *(state.name for state in rule.states), *([AVERAGE] if len(states) > len(rule.states) else []))
    roles = dict(zip(names, (parameter, plain(DTYPES[dtypes].gradient), *states), strict=True))
    return {names[i]: roles[names[i]] for i in roles_read(rule.rule)} if rule.sums else roles


def floor(rule: AuditedRule, dtypes: str) -> tuple[float, float]:
    """The fewest bytes an element that are read and written."""
    roles = roles_of(rule, dtypes)
    read = sum(codec.nbytes if role == "g" else codec.nbytes_read for role, codec in roles.items())
    return read, 0.0 if rule.sums else sum(codec.nbytes for role, codec in roles.items() if role != "g")
