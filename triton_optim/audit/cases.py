"""What is audited: the rules of all optimizers, how they are kept, and for which GPUs."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget

from ..buckets.step_scalars import step_scalars_for
from ..core.optimizer import RuleOptimizer
from ..kernels.source import python_function, source_of
from ..kernels.straight import roles_read, straight
from ..precision.codecs import STATE_CODES, Codec, codes, parameter_codec, plain, stochastic
from ..registry import rule_optimizers
from ..spec import AVERAGE, State

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


def roles_of(rule: AuditedRule, dtypes: str) -> dict[str, Codec]:
    """How each of p, g and the states is kept; of what is summed, those that are read."""
    parameter, *states = role_codecs(rule, dtypes)
    names = ("p", "g", *(state.name for state in rule.states), *([AVERAGE] if len(states) > len(rule.states) else []))
    roles = dict(zip(names, (parameter, plain(DTYPES[dtypes].gradient), *states), strict=True))
    return {names[i]: roles[names[i]] for i in roles_read(rule.rule)} if rule.sums else roles
