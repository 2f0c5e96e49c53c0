"""What lies around an optimizer's rule: the optimizer that it makes of another is one rule again, and one kernel."""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..core.optimizer import RuleOptimizer
from ..kernels.language import jit, torch_form
from ..kernels.straight import composed, straight
from ..spec import Measured, State, Variant
from ..util.hyperparameters import plain_group

Base = TypeVar("Base", bound=type[RuleOptimizer])
DECAY = "weight_decay"


def unchecked(group: dict[str, Any]) -> None:
    """Refuses nothing."""


def nothing(*_: Any) -> dict[str, Any]:
    """No scalars."""
    return {}


@jit
def passed(base, p, g, states, h, own, w):  # type: ignore[no-untyped-def]
    """What the base measures."""
    return base(p, g, *states, h)


@dataclass(frozen=True, eq=False)
class Wrapper:
    """A function on optimizers: called with a class, it returns a class whose rule is around that one's.

    The rule of a wrapper is a ``@jit`` function ``rule(base, p, g, states, h, own, w)``. It calls ``base(p, g, *states,
    h)``, the rule that is wrapped, and returns the new ``p``, then `states`, then `own`, the wrapper's states; `w` are
    its scalars. With 0 for `p` the base returns what its step adds to the parameter, exactly.

    Attributes:
        name: what the name of the class begins with.
        rule: as above.
        measure: what is summed over each parameter, with the arguments of `rule`; for `factors`.
        hyperparameters: by name, those that groups have besides, and their defaults.
        check: raises ValueError where one is out of range.
        scalars: of a group and the number of the update, the wrapper's own by name.
        factors: of what was measured, those of them that differ between parameters.
        states: those that the wrapper keeps of each parameter.
        prologue: of the gradients, what takes their place.
        takes_decay: the wrapper decays weights, and the base is told a ``weight_decay`` of 0.
        moves_only: the base is asked for its step, as if the parameter were 0.
        reads_gradient: it compares with the gradient, which the rule behind a prologue does not see.
        counts_steps: its scalars depend on the number of the update.
        place: the public function that returns what this makes, as "module:name", by which optimizers are pickled;
            copied they are without it, too.
    """

    name: str
    rule: Any = None
    measure: Any = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[dict[str, Any]], None] = unchecked
    scalars: Callable[[dict[str, Any], Any], dict[str, Any]] = nothing
    factors: Callable[[Measured], dict[str, Any]] = nothing
    states: tuple[State, ...] = ()
    prologue: Callable[[Tensor], Tensor] | None = None
    takes_decay: bool = False
    moves_only: bool = False
    reads_gradient: bool = False
    counts_steps: bool = False
    place: str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapper:
        return self

    def __call__(self, base: Base) -> Base:
        """The class; of one base, one."""
        of: Any = base
        return made(self, of)  # type: ignore[return-value]

    @property
    def prefix(self) -> str:
        """What the names of its scalars begin with among all."""
        return f"{self.name.lower()}_"

    def refuse(self, base: type[RuleOptimizer], why: str) -> None:
        """Raise TypeError: this is not for that optimizer."""
        raise TypeError(
            f"{self.name} can't be around {base.__name__}: {why}. Take another optimizer, or another wrapper."
        )

    def variant(self, base: Variant) -> Variant:
        """One way to run, of one of the base's."""
        names, own, measure = base.state_names, [state.name for state in self.states], base.measure
        if self.measure is not None:
            measure = composed(self.measure, base.rule, names, own, self.prefix)
        elif measure is not None and self.states:
            measure = composed(passed, measure, names, own, self.prefix)
        rule = base.rule
        if self.rule is not None:
            rule = composed(self.rule, rule, names, own, self.prefix)
        prologue = base.prologue or self.prologue is not None
        return Variant(rule, (*base.states, *self.states), prologue, measure=measure, sampled=base.sampled)


class OwnDefaults(RuleOptimizer):
    """Adds what wrappers have to the defaults of the groups."""

    own_defaults: dict[str, Any]

    def __init__(self, params: Any, defaults: dict[str, Any], **options: Any) -> None:
        super().__init__(params, {**defaults, **self.own_defaults}, **options)


def check_fits(wrapper: Wrapper, base: type[RuleOptimizer]) -> None:
    """Raise TypeError where a wrapper is not for this."""
    if not (isinstance(base, type) and issubclass(base, RuleOptimizer)) or not base.variants:
        raise TypeError(
            f"{wrapper.name} is around the class of an optimizer that has a rule, such as AdamW; got {base!r}. Give it "
            "the class, and make the optimizer of what it returns."
        )
    if wrapper.measure is not None and any(variant.measure is not None for variant in base.variants):
        wrapper.refuse(base, "both sum over parameters first, and a step does so once")
    if wrapper.reads_gradient and any(variant.prologue for variant in base.variants):
        wrapper.refuse(base, "its rule never sees the gradient, but what a prologue makes of it")
    if wrapper in base.__dict__.get("wrappers", ()):
        wrapper.refuse(base, "it is already")
    if both := [state.name for state in wrapper.states if state.name in {*base.declared, *base.kept_names}]:
        wrapper.refuse(base, f"both keep {both[0]}")


@cache
def made(wrapper: Wrapper, base: type[RuleOptimizer]) -> type[RuleOptimizer]:
    """The class that a wrapper makes of another.

    Raises:
        TypeError: it is no optimizer with a rule, or one that the wrapper is not for.
    """
    check_fits(wrapper, base)
    given = [*inspect.signature(base.__init__).parameters.values()]
    own = dict(wrapper.hyperparameters)
    if wrapper.takes_decay:
        own.setdefault(DECAY, 0.0)
    own = {name: value for name, value in own.items() if name not in {p.name for p in given}}
    variants = tuple(map(wrapper.variant, base.variants))
    inner: Any = base
    types: dict[type, Any] = {}  # of scalars, by those of the base
    additive: set[Variant] = set()  # of the base, known to move a parameter by what does not depend on it

    def __init__(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        chosen = {name: kwargs.pop(name, value) for name, value in own.items()}
        self.own_defaults = {**getattr(self, "own_defaults", {}), **chosen}
        inner.__init__(self, params, *args, **kwargs)

    def told(group: dict[str, Any]) -> dict[str, Any]:
        return {**group, DECAY: 0.0} if wrapper.takes_decay and DECAY in group else group

    def check_hyperparameters(self: Any, group: dict[str, Any]) -> None:
        inner.check_hyperparameters(self, group)
        wrapper.check({**wrapper.hyperparameters, **own, **group})

    def scalars(self: Any, group: dict[str, Any], step: Any, **scalar_state: Any) -> Any:
        h = inner.scalars(self, told(group), step, **scalar_state)
        besides = wrapper.scalars(group, step)
        if not besides:
            return h
        kind = types.get(type(h))
        if kind is None:
            fields = (*h._fields, *(wrapper.prefix + name for name in besides))
            kind = types[type(h)] = namedtuple(f"{wrapper.name}{type(h).__name__}", fields)
        return kind(*h, *besides.values())

    def factors(self: Any, measured: Measured) -> dict[str, Any]:
        if wrapper.measure is not None:
            return {wrapper.prefix + name: values for name, values in wrapper.factors(measured).items()}
        return inner.factors(self, measured._replace(group=told(measured.group)))  # type: ignore[no-any-return]

    def check_parameter(self: Any, index: int, p: Tensor, group: dict[str, Any]) -> None:
        inner.check_parameter(self, index, p, group)
        of = base.variants[type(self).variants.index(self.variant(group))]
        if wrapper.moves_only and of not in additive:
            plain = plain_group(told(group))
            check_additive(wrapper, base, of, inner.scalars(self, plain, 1, **self.init_scalar_state(plain)))
            additive.add(of)

    title = f"{base.__name__} within :func:`{wrapper.place.partition(':')[2] or wrapper.name}`."
    namespace: dict[str, Any] = {
        "__doc__": f"{title}\n\n{base.__doc__}",
        "__module__": base.__module__,
        "variants": variants,
        "wrappers": (*base.__dict__.get("wrappers", ()), wrapper),
        "unwrapped": base.__dict__.get("unwrapped", base),
        "counts_steps": base.counts_steps or wrapper.counts_steps,
        "scalars": scalars,
        "check_hyperparameters": check_hyperparameters,
        "check_parameter": check_parameter,
        "factors": factors,
        "__init__": __init__,
        "__reduce_ex__": reduced,
    }
    if wrapper.prologue is not None:
        namespace["prologue"] = prologue_of(wrapper, base)
    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=v) for name, v in own.items()]
    rest = [p for p in given if p.kind is inspect.Parameter.VAR_KEYWORD]
    first = [p for p in given if p not in rest]
    __init__.__signature__ = inspect.Signature([*first, *keywords, *rest])  # type: ignore[attr-defined]
    return type(f"{wrapper.name}{base.__name__}", (base, OwnDefaults), namespace)


def prologue_of(wrapper: Wrapper, base: type[RuleOptimizer]) -> Any:
    """The prologue of a wrapper, and after it the base's, where a group has one."""
    change = wrapper.prologue
    assert change is not None

    def prologue(
        self: Any, group: dict[str, Any], h: Any, params: list[Tensor], gradients: list[Tensor], states: list[Any]
    ) -> list[Tensor]:
        changed = list(map(change, gradients))
        if not base.variants[type(self).variants.index(self.variant(group))].prologue:
            return changed
        return base.prologue(self, group, h, params, changed, states)

    return prologue


def check_additive(wrapper: Wrapper, base: type[RuleOptimizer], variant: Variant, h: Any) -> None:
    """Raise TypeError where what a rule adds to a parameter depends on the parameter."""
    random = torch.Generator().manual_seed(0)
    p, g, *states = torch.rand(2 + len(variant.states), 8, generator=random, dtype=torch.float64, device="cpu")
    function = torch_form(straight(variant.rule))
    at_zero, at_p = function(torch.zeros_like(p), g, *states, h), function(p, g, *states, h)
    moves = zip(at_zero, (at_p[0] - p, *at_p[1:]), strict=True)
    if not all(torch.allclose(a.expand_as(p), b, rtol=1e-9, atol=1e-9) for a, b in moves):
        wrapper.refuse(base, "what its rule adds to a parameter, or keeps, depends on the parameter")


def reduced(self: Any, protocol: Any) -> Any:
    """As an optimizer is pickled and copied: its class has no name by which it is found, unless it is a subclass of one
    that a wrapper made.
    """
    own = type(self).__dict__
    if "wrappers" not in own:
        return object.__reduce_ex__(self, protocol)
    first, *others = (wrapper.place or wrapper for wrapper in own["wrappers"])
    return unpickled, (first, own["unwrapped"], *others), self.__getstate__()


def unpickled(first: str | Wrapper, base: type[RuleOptimizer], *others: str | Wrapper) -> RuleOptimizer:
    """An optimizer without its state, of the class that wrappers, or the public functions at places, make one after the
    other.
    """
    kind: Any = base
    for around in (first, *others):
        if isinstance(around, str):
            module, _, name = around.partition(":")
            kind = getattr(import_module(module), name)(kind)
        else:
            kind = around(kind)
    return cast(RuleOptimizer, kind.__new__(kind))
