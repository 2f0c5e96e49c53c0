"""A rule is one thing on every backend: what is no word of the language is refused before anything is made, with the
place and what to write instead; numbers are what they are in Python; the source is that which was defined.
"""

from __future__ import annotations

import importlib
import inspect
import linecache
import math
import py_compile
import re
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import CPP, TRITON_LOOPS
from torch.nn import Parameter

import triton_optim
from triton_optim import RuleOptimizer
from triton_optim.engine import fallback
from triton_optim.kernels import language
from triton_optim.kernels.language import (
    RuleError,
    abs,
    exp,
    jit,
    log,
    maximum,
    minimum,
    python_function,
    sign,
    sqrt,
    where,
)
from triton_optim.kernels.straight import straight
from triton_optim.spec import State

tl = language.tl
F32, F64 = torch.float32, torch.float64
NO_TRITON = pytest.mark.skipif(not TRITON_LOOPS, reason="no Triton, or an interpreter of it that NumPy broke")
BACKENDS = [
    "eager",
    pytest.param("cpp", marks=CPP),
    pytest.param("triton", marks=NO_TRITON),
]


class Scalars(NamedTuple):
    lr: float
    a: float


class Own(RuleOptimizer):
    """An optimizer from whatever rule a test brings."""

    states = (State("m"),)

    def __init__(self, params: Any, lr: float = 0.1, a: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "a": a}, **options)

    def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
        return Scalars(group["lr"], group["a"])


def optimizer_of(a_rule: Any) -> type[RuleOptimizer]:
    return type("Own", (Own,), {"rule": a_rule})


P, G, M = [0.5, -0.7, 0.3, 2.0], [0.02, -0.25, 3.1, 0.0], [0.0, 1.0, -1.0, 0.05]


def stepped(rule: Any, backend: str, dtype: torch.dtype = F64, **options: Any) -> tuple[list[float], list[float]]:
    """The parameter and the state after a step from P, G and M."""
    p = Parameter(torch.tensor(P, dtype=dtype))
    optimizer = optimizer_of(rule)([p], backend=backend, **options)
    optimizer.state[p]["m"] = torch.tensor(M, dtype=dtype)
    p.grad = torch.tensor(G, dtype=dtype)
    optimizer.step()
    return p.tolist(), optimizer.state[p]["m"].tolist()


# Numbers.

FACTOR = 0.3
PAIR = (0.1, 7)


@jit
def named_number(p, g, m, h):
    beta = 0.99999
    rest = 1 - beta
    m = beta * m + rest * g
    return p - h.lr * m, m


@jit
def numbers_in_where(p, g, m, h):
    step = where(g > 0, 0.1, 0.2)
    return p - step, where(m > 0, h.a, FACTOR)


@jit
def bounded(p, g, m, h):
    return p - maximum(g, 0.1), minimum(h.a, m) + maximum(-0.2, m)


@jit
def signs_times_numbers(p, g, m, h):
    return p - sign(g) * 0.1, tl.where(m > 0, 0.1 * sign(m), m) + PAIR[0] * PAIR[1]


@jit
def conditions_on_scalars(p, g, m, h):
    none = h.a == 0
    return where(none, p, p - h.lr * g), where(~none & (g > 0), 0.1, where(h.a > 5, m, 2))


@jit
def conditions_as_numbers(p, g, m, h):
    return p - (g * m > 0) * g * h.lr, (h.a > 5) * m + (g > 0) + True


@jit
def number_for_all(p, g, m, h):
    return p, h.a


@jit
def helper(x, y, factor=0.1):
    small = 0.7
    if factor > 0.5:
        return x * factor
    x += y
    return x * factor + small, x


@jit
def calls(p, g, m, h):
    """Tuples, helpers, default and named arguments, branches on numbers, names of words."""
    sqrt, both = helper(g, m), (p, g)
    abs: float = both[1] if FACTOR > 0.2 else m
    p, g = g, p
    return sqrt[0] + helper(p, abs, factor=0.9) + g, -(+sqrt[1])


def by_hand(function: Callable[..., tuple[float, float]]) -> tuple[list[float], list[float]]:
    found = [function(*x) for x in zip(P, G, M, strict=True)]
    return [x for x, _ in found], [y for _, y in found]


EXPECTED: dict[Any, Callable[..., tuple[float, float]]] = {
    named_number: lambda p, g, m: (p - 0.1 * (0.99999 * m + (1 - 0.99999) * g), 0.99999 * m + (1 - 0.99999) * g),
    numbers_in_where: lambda p, g, m: (p - (0.1 if g > 0 else 0.2), 0.1 if m > 0 else 0.3),
    bounded: lambda p, g, m: (p - max(g, 0.1), min(0.1, m) + max(-0.2, m)),
    signs_times_numbers: lambda p, g, m: (
        p - (g and math.copysign(0.1, g)),
        (0.1 if m > 0 else m) + 0.1 * 7,
    ),
    conditions_on_scalars: lambda p, g, m: (p - 0.1 * g, 0.1 if g > 0 else 2.0),
    conditions_as_numbers: lambda p, g, m: (p - (g * m > 0) * g * 0.1, 0.0 * m + (g > 0) + 1),
    number_for_all: lambda p, g, m: (p, 0.1),
    calls: lambda p, g, m: ((g + m) * 0.1 + 0.7 + g * 0.9 + p, -(g + m)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", EXPECTED, ids=lambda rule: rule.__name__)
def test_numbers_are_what_they_are_in_python(rule: Any, backend: str) -> None:
    """In float64, where a float32 number between would show."""
    for found, expected in zip(stepped(rule, backend), by_hand(EXPECTED[rule]), strict=True):
        assert found == pytest.approx(expected, rel=1e-15, abs=1e-16)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own compiler
@CPP
def test_numbers_are_what_they_are_in_python_where_torch_compiles() -> None:
    @jit
    def all_at_once(p, g, m, h):
        first = numbers_in_where(p, g, m, h)
        second = conditions_on_scalars(p, bounded(p, g, m, h)[0], m, h)
        third = named_number(first[0], g, second[1], h)
        return third[0] + (g > 0), maximum(third[1], 0.1) * first[1]

    found, expected = (stepped(all_at_once, backend) for backend in ("compiled", "eager"))
    assert found[0] == pytest.approx(expected[0], rel=1e-15, abs=1e-16)
    assert found[1] == pytest.approx(expected[1], rel=1e-15, abs=1e-16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_factor_of_a_named_number_in_float32(backend: str) -> None:
    for found, expected in zip(stepped(named_number, backend, F32), by_hand(EXPECTED[named_number]), strict=True):
        assert found == pytest.approx(expected, rel=3e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"capturable": True}, {"state_dtype": "int8"}], ids=str)
def test_options_change_no_number(options: dict[str, Any], backend: str) -> None:
    p, q = (Parameter(torch.linspace(-1, 1, 4096 + 5)) for _ in range(2))
    for x, b in ((p, backend), (q, "eager")):
        optimizer = optimizer_of(conditions_on_scalars)([x], backend=b, **options)
        x.grad = torch.linspace(-3, 2, 4096 + 5)
        optimizer.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_the_lines_are_those_of_the_rule() -> None:
    assert inspect.getsource(python_function(straight(named_number))) == (
        "def named_number(p, g, m, h):\n"
        "    m_1 = 0.99999 * m + 9.99999999995449e-06 * g\n"
        "    return (p - h.lr * m_1, m_1)\n"
    )
    assert straight(straight(named_number)) is straight(named_number)


# What is refused.


def not_decorated(x):
    return x


@jit
def returns_nothing(x):
    x = x + 1


@jit
def calls_itself(x):
    return calls_itself(x)


@jit
def helper_with_a_fault(x):
    return tl.sigmoid(x)


LIMITS = torch.tensor([0.1])

# A rule's lines, the word that is named, and what the error says of it.
REFUSED = [
    ("if g > 0:\n        g = -g", "if g > 0:", "where(condition, x, y)"),
    ("if h.a > 0:\n        g = -g", "if h.a > 0:", "where(condition, x, y)"),
    ("g = g if m > 0 else m", "g if m > 0 else m", "where(condition, x, y)"),
    ("for _ in range(3):\n        g = g + m", "for _ in range(3):", "Write out the lines"),
    ("while FACTOR > 1:\n        g = g + m", "while FACTOR > 1:", "Write out the lines"),
    ("g = clamp(g, -1.0, 1.0)", "clamp", "Import it: from triton_optim.kernels.words import clamp"),
    ("g = tl.sigmoid(g)", "tl.sigmoid", "1 / (1 + exp(-x))"),
    ("g = g * tl.sum(g)", "tl.sum", "prologue"),
    ("g = g.abs()", "g.abs", "Write abs(x)"),
    ("g = g.clamp(0.0)", "g.clamp", "Write clamp(x), imported from triton_optim.kernels.words"),
    ("g = g.clip(0.0)", "g.clip", "Write clamp(x, low, high)"),
    ("g = g ** 2.0", "g ** 2.0", "Write x**2"),
    ("g = g ** 17", "g ** 17", "powers go from -16 to 16"),
    ("g = g * h.a ** 2", "h.a ** 2", "Form it in scalars()"),
    ("g = g ** 0.5", "g ** 0.5", "Write sqrt(x)"),
    ("g = g ** m", "g ** m", "exp(y * log(x))"),
    ("g = pow(g, 2)", "pow", "x**2"),
    ("g = -g % 0.3", "-g % 0.3", "x - y * floor(x / y)"),
    ("g = g // 0.3", "g // 0.3", "floor(x / y)"),
    ("g = g @ m", "g @ m", "prologue"),
    ("g = g << 2", "g << 2", "values have no bits"),
    ("g = g & m", "g & m", "only conditions"),
    ("g = ~g", "~g", "of a condition"),
    ("g = not g", "not g", "of a condition"),
    ("g = where(not (g > 0), g, m)", "not g > 0", "~"),
    ("g = -(g > 0)", "-(g > 0)", "opposite of a condition"),
    ("g = where((g > 0) and (m > 0), g, m)", "g > 0 and m > 0", "&"),
    ("g = where(0 < g < 1, g, m)", "0 < g < 1", "(x < y) & (y < z)"),
    ("g = where(g, g, m)", "where(g, g, m)", "condition first"),
    ("g = where(g > 0, g)", "where(g > 0, g)", "3 arguments"),
    ("g = where(g > 0, x=g, y=m)", "where(g > 0, x=g, y=m)", "3 arguments"),
    ("g = where(g > 0, g, None)", "None", "a number or value"),
    ("g = g + (1 - h.a) * m", "1 - h.a", "Form it in scalars()"),
    ("g = g / (h.a / h.lr)", "h.a / h.lr", "Form it in scalars()"),
    ("g = g / sqrt(h.a)", "sqrt(h.a)", "Form it in scalars()"),
    ("g = g / sqrt(2.0)", "sqrt(2.0)", "Write its value"),
    ("g = g + 1 / 0", "1 / 0", "division by zero"),
    ("g = g * 10 ** 10 ** 10", "10 ** 10 ** 10", "too large"),
    ("g = g * 10 ** 400", "10 ** 400", "too large"),
    ("g = g * (1 + 2j)", "2j", "none of the words"),
    ("g = torch.tanh(g)", "torch.tanh", "exp(2 * x)"),
    ("g = torch.erfinv(g)", "torch.erfinv", "none of the words"),
    ("g = mystery(g)", "mystery", "not defined"),
    ("g = floor(g)", "floor", "import floor"),
    ("g = not_decorated(g)", "not_decorated", "Decorate it"),
    ("g = returns_nothing(g)", "def returns_nothing", "returns nothing"),
    ("g = calls_itself(g)", "calls_itself()", "no loops"),
    ("g = helper_with_a_fault(g)", "tl.sigmoid", "called by the rule rule: Write 1 / (1 + exp(-x))"),
    ("g = helper(g)", "helper(g)", "missing a required argument: 'y'"),
    ("g = helper(*g)", "*g", "only of a tuple"),
    ("g = helper(**{})", "helper(**{})", "each argument"),
    ("g, *m = ()", "(g, *m)", "as many as there are values"),
    ("g = LIMITS * g", "LIMITS", "none of the words"),
    ("g = late * g\n    late = 3", "late", "before it is set"),
    ("g = h[0] * g", "h[0]", "scalars have names"),
    ("g = g[0]", "g[0]", "no elements"),
    ("g = (g, m)[2]", "(g, m)[2]", "out of range"),
    ("g[0] = m", "g[0]", "only names"),
    ("g, m = g", "(g, m)", "as many as there are values"),
    ("g = g.to(torch.float32)", "g.to", "one dtype"),
    ("g = float(g)", "float(g)", "one dtype"),
    ("g = g * 'a'", "'a'", "a number or value"),
    ("g = g + (m := m + 1)", "(m := (m + 1))", "none of the words"),
    ("g = (lambda x: x)(g)", "lambda x: x", "outside, with @jit"),
    ("g = [x for x in (g, m)][0]", "[x for x in (g, m)]", "no loops"),
    ("print(g)", "print", "only computes"),
    ("assert FACTOR > 1", "assert FACTOR > 1", "only computes"),
    ("global FACTOR\n    FACTOR = 2", "global FACTOR", "none of the words"),
    ("def own(x):\n        return x\n    g = own(g)", "def own(x):", "outside, with @jit"),
    ("momentum = m\n    g = momentun * g", "momentun", "not defined. Write momentum, if that was meant"),
    ("g = lr * g", "lr", "not defined. Write h.lr, if scalars() returns it"),
    ("return p", "return p", "a tuple of p and its 1 states"),
    ("return p, h", "return (p, h)", "a number or value"),
    ("return", "return", "a tuple of p and its 1 states"),
]


@pytest.fixture
def defined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Makes a rule of lines, in a file."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made: list[str] = []

    def define(lines: str, **more: Any) -> tuple[Any, Path]:
        name = f"rule_of_a_test_{len(made)}"
        path = tmp_path / f"{name}.py"
        names = "FACTOR, LIMITS, abs, exp, helper, helper_with_a_fault, log, maximum, minimum, not_decorated"
        path.write_text(
            f"import torch\nfrom test_rules import {names}\n"
            "from test_rules import calls_itself, jit, returns_nothing, sign, sqrt, tl, where\n\n"
            f"@jit\ndef rule(p, g, m, h):\n    {lines}\n    return p - h.lr * g, m\n"
        )
        made.append(name)
        sys.modules.pop(name, None)
        return importlib.import_module(name).rule, path

    yield define
    for name in made:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("lines", "word", "advice"), REFUSED, ids=[line.splitlines()[0] for line, *_ in REFUSED])
def test_what_is_no_word_is_refused(lines: str, word: str, advice: str, defined: Any) -> None:
    """At construction, with file, line, word, what to write, and the words there are."""
    rule, path = defined(lines)
    p = Parameter(torch.zeros(3))
    with pytest.raises(RuleError) as error:
        optimizer_of(rule)([p])
    text = str(error.value)
    assert f"`{word}`" in text
    assert advice in text
    assert "Rules may use + - * /, whole powers, comparisons" in text
    assert "sqrt, where" in text
    file, line = re.search(r"` \((.*?), line (\d+)\)", text).groups()  # type: ignore[union-attr]
    named = Path(file).read_text().splitlines()[int(line) - 1]
    assert Path(file) == path or "helper" in text or "returns_nothing" in text or "calls_itself" in text
    if Path(file) == path:
        assert any(own.strip() in ("return p - h.lr * g, m", named.strip()) for own in lines.splitlines())


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_every_backend_says_the_same(backend: str, defined: Any) -> None:
    rule, _ = defined("g = g ** 0.5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuleError, match=r"^rule uses `g \*\* 0\.5` .*Write sqrt\(x\)\."):
            optimizer_of(rule)([Parameter(torch.zeros(3))], backend=backend)


def test_the_line_is_that_of_the_word(defined: Any) -> None:
    rule, path = defined("g = (\n        g\n        + tl.sigmoid(m)\n    )")
    with pytest.raises(RuleError) as error:
        straight(rule)
    line = int(str(error.value).split("line ")[1].split(")")[0])
    assert "tl.sigmoid" in path.read_text().splitlines()[line - 1]


@jit
def one_state(p, g, m, h):
    return p - g, m


@jit
def returns_too_much(p, g, m, h):
    return p - g, m, g


@jit
def returns_too_little(p, g, m, h):
    return (p - g,)


def test_the_states_of_a_rule_are_counted() -> None:
    p = Parameter(torch.zeros(3))
    with pytest.raises(RuleError, match="takes 1 states, and its optimizer has 2"):
        type("Two", (Own,), {"rule": one_state, "states": (State("m"), State("v"))})([p])
    for rule, count in ((returns_too_much, 3), (returns_too_little, 1)):
        with pytest.raises(RuleError, match=f"returned {count} values; .* a tuple of p and its 1 states"):
            optimizer_of(rule)([p])
    with pytest.raises(RuleError, match="must be a @jit function; got 'sgd'"):
        optimizer_of("sgd")([p])

    @jit
    def of_anything(p, *rest):
        return p, rest[1]

    with pytest.raises(RuleError, match="is no rule: a rule takes p, g, its states and h"):
        optimizer_of(of_anything)([p])


@jit
def turned(p, g, square, mean, h):
    return p - h.lr * mean, square, mean


@jit
def gradient_first(grad, p, m, h):
    return p - h.lr * grad, m


def test_arguments_in_another_order() -> None:
    """Names that would mean each other's values; which others a rule has for its states is its own affair."""
    p = Parameter(torch.zeros(3))
    states = (State("mean"), State("square"))
    with pytest.raises(RuleError, match=r"takes its states as square, mean, and .* declares them as mean, square"):
        type("Turned", (Own,), {"rule": turned, "states": states})([p])
    type("Renamed", (Own,), {"rule": turned, "states": (State("m"), State("v"))})([p])
    with pytest.raises(RuleError, match=r"takes grad first, where the parameter is given. Give it p, g"):
        optimizer_of(gradient_first)([p])


def test_a_class_without_a_rule_and_a_rule_without_a_name() -> None:
    with pytest.raises(TypeError, match=r"Bare has no rule. Set `rule = ...`"):
        type("Bare", (triton_optim.RuleOptimizer,), {})([Parameter(torch.zeros(3))], {"lr": 0.1})
    with pytest.raises(RuleError, match=r"a lambda is no rule \(.*test_rules.py, line \d+\).* Define the rule by def"):
        jit(lambda p, g, h: (p - h.lr * g,))


@jit
def descends(p, g, m, h):
    return p - h.lr * g, m


def test_options_among_the_hyperparameters() -> None:
    """As the optimizers of torch have them there; those by keyword count."""
    p = Parameter(torch.zeros(3))
    p.grad = torch.full((3,), 2.0)
    base = optimizer_of(descends)
    optimizer = base([p], maximize=False)
    for given, moved in (({"maximize": True}, 1), ({"maximize": True, "max_grad_norm": 0.1}, 1), ({}, -1)):
        kind = type("Given", (base,), {"__init__": lambda self, params, given=given: RuleOptimizer.__init__(
            self, params, {**optimizer.defaults, **given})})  # fmt: skip
        q = Parameter(torch.zeros(3))
        q.grad = p.grad
        own = kind([q])
        own.step()
        assert torch.equal(q.sign(), torch.full((3,), float(moved)))
        assert own.max_grad_norm == given.get("max_grad_norm")
    with pytest.raises(ValueError, match="max_grad_norm"):
        type("Given", (base,), {"__init__": lambda self, params: RuleOptimizer.__init__(
            self, params, {**optimizer.defaults, "max_grad_norm": -1.0})})([p])  # fmt: skip


STARTS = {
    "too small": lambda p, _: torch.ones(1),
    "on meta": lambda p, _: torch.empty_like(p, device="meta"),
    "nothing": lambda p, _: None,
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_state_that_starts_unlike_its_parameter(start: Any, backend: str, device: torch.device) -> None:
    """Compiled code would read past its end."""
    p = Parameter(torch.zeros(3, device=device))
    p.grad = torch.ones_like(p)
    optimizer = type("Odd", (Own,), {"rule": one_state, "states": (State("m", start=start),)})([p], backend=backend)
    with pytest.raises(TypeError, match=r"Odd starts its state m with .* Return a number, or a new tensor like"):
        optimizer.step()
    assert p.tolist() == [0, 0, 0]


def test_every_variant_is_checked_at_construction(defined: Any) -> None:
    """Not when it is switched to in the middle of a training."""
    fault, _ = defined("g = g ** 0.5")
    variants = (triton_optim.Variant(one_state, (State("m"),)), triton_optim.Variant(fault, (State("m"),)))
    with pytest.raises(RuleError, match="Write sqrt"):
        type("Switched", (Own,), {"variants": variants})([Parameter(torch.zeros(3))])


@jit
def misspelt(p, g, m, h):
    return p - h.lrr * g, m


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_an_error_in_scalars_is_what_is_raised(backend: str) -> None:
    """And not what a backend failed with, which another might do without."""
    p = Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = type("Faulty", (Own,), {"rule": one_state, "scalars": lambda self, group, step: group["lrr"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match=r"^'lrr'$"):
            optimizer([p], backend=backend).step()


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_scalar_that_is_not_there(backend: str) -> None:
    p = Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = optimizer_of(misspelt)([p], backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuleError, match=r"uses `h.lrr` \(.*line \d+\), and scalars\(\) returned no lrr; .*lr, a"):
            optimizer.step()
    assert p.tolist() == [0, 0, 0]


def test_a_rule_that_nests_too_deeply(defined: Any) -> None:
    rule, _ = defined("g = " + "abs(" * 80 + "g" + ")" * 80)
    straight(rule)
    rule, _ = defined("g = g" + " + g" * 1500)
    with pytest.raises(RuleError, match="Give parts of it names"):
        straight(rule)


# Where a rule is defined, and when.

TEXT = """
from triton_optim.kernels.language import jit, sqrt

SCALE = 2.0

@jit
def rule(p, g, m, h):
    return p - 1.0 * g, m + SCALE
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_is_edited_after_it_was_imported(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs is what was imported; what is imported anew is the new."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "edited_rule.py"
    path.write_text(TEXT)
    sys.modules.pop("edited_rule", None)
    module = importlib.import_module("edited_rule")
    path.write_text("\n" + TEXT.replace("p - 1.0 * g", "p + 1.0 * g"))
    linecache.checkcache()
    found = stepped(module.rule, backend)[0]
    assert found == pytest.approx([p - g for p, g in zip(P, G, strict=True)])
    found = stepped(importlib.reload(module).rule, backend)[0]
    assert found == pytest.approx([p + g for p, g in zip(P, G, strict=True)])
    sys.modules.pop("edited_rule")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("around", ["module", "function"])
def test_a_number_that_changes_raises(around: str, backend: str, defined: Any) -> None:
    scale = 1.0
    if around == "module":
        rule, _ = defined("m = m + FACTOR")
        change = lambda value: rule_globals.__setitem__("FACTOR", value)  # noqa: E731
        rule_globals = python_function(rule).__globals__
        name = "FACTOR"
    else:

        @jit
        def rule(p, g, m, h):
            return p, m + scale

        def change(value: float) -> None:
            nonlocal scale
            scale = value

        name = "scale"
    p = Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = optimizer_of(rule)([p], backend=backend)
    optimizer.step()
    before = optimizer.state[p]["m"].clone()
    change(3.0)
    with pytest.raises(RuleError, match=rf"{name}, which the rule rule reads, was .* and is 3.0 now.*scalars\(\)"):
        optimizer.step()
    with pytest.raises(RuleError, match=f"{name}, which"):
        optimizer_of(rule)([p], backend=backend)
    assert torch.equal(optimizer.state[p]["m"], before)
    change(0.3 if around == "module" else 1.0)
    optimizer.step()
    assert torch.allclose(optimizer.state[p]["m"], 2 * before)


def test_a_rule_of_a_text_without_a_file() -> None:
    with pytest.raises(RuleError, match=r"source of rule can't be read \(<nowhere>\).*Define the function in a file"):
        exec(compile(TEXT, "<nowhere>", "exec"), {})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rule_of_a_text_that_python_was_told_of(backend: str) -> None:
    """As what the error says, and as a notebook's cell."""
    name, scope = "<a cell>", {"__name__": "__main__"}
    linecache.cache[name] = (len(TEXT), None, TEXT.splitlines(True), name)
    exec(compile(TEXT, name, "exec"), scope)
    del linecache.cache[name]
    assert stepped(scope["rule"], backend)[1] == pytest.approx([m + 2 for m in M])


def test_a_rule_in_a_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "rules.zip", "w") as archive:
        archive.writestr("zipped_rule.py", TEXT)
    monkeypatch.syspath_prepend(tmp_path / "rules.zip")
    module = importlib.import_module("zipped_rule")
    assert ".zip" in module.__file__
    for backend in ("eager", *(["cpp"] if not CPP.args[0] else []), *(["triton"] if TRITON_LOOPS else [])):
        assert stepped(module.rule, backend)[1] == pytest.approx([m + 2 for m in M])
    sys.modules.pop("zipped_rule")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own compiler
def test_a_rule_of_which_only_compiled_code_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs where no source is needed, unchecked; automatically, too."""
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "sourceless_rule.py"
    source.write_text(TEXT)
    py_compile.compile(str(source), cfile=str(tmp_path / "sourceless_rule.pyc"))
    source.unlink()
    module = importlib.import_module("sourceless_rule")
    assert stepped(module.rule, "eager")[1] == pytest.approx([m + 2 for m in M])
    monkeypatch.setattr(fallback, "next_best", lambda *_: "eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert stepped(module.rule, "auto")[1] == pytest.approx([m + 2 for m in M])
    assert all("Install its .py file, too" in str(warning.message) for warning in said)
    sys.modules.pop("sourceless_rule")


def test_a_file_that_no_longer_holds_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written between import and decoration: another function stands there."""

    def rule(p, g, m, h):
        return p, m

    rule.__name__ = "renamed"
    with pytest.raises(RuleError, match=r"test_rules\.py, line \d+, holds no `def renamed`"):
        straight(jit(rule))


@pytest.mark.parametrize("backend", BACKENDS)
def test_words_under_other_names(backend: str) -> None:
    root = sqrt

    @jit
    def rule(p, g, m, h):
        return p, root(abs(g)) + tl.sqrt(abs(m)) + language.exp(g) - log(exp(m)) + 2 * math.pi

    expected = [
        math.sqrt(math.fabs(g)) + math.sqrt(math.fabs(m)) + math.exp(g) - m + 2 * math.pi
        for g, m in zip(G, M, strict=True)
    ]
    assert stepped(rule, backend)[1] == pytest.approx(expected, rel=1e-14)


def test_tl_words_keep_nan_on_every_backend() -> None:
    """Triton's own maximum drops it."""

    @jit
    def rule(p, g, m, h):
        return tl.maximum(p, g), tl.minimum(m, g)

    for backend in ("eager", *(["triton"] if TRITON_LOOPS else [])):
        p = Parameter(torch.tensor([1.0, math.nan, 1.0]))
        p.grad = torch.tensor([math.nan, 1.0, 2.0])
        optimizer = optimizer_of(rule)([p], backend=backend)
        optimizer.step()
        assert p.isnan().tolist() == [True, True, False]
        assert optimizer.state[p]["m"].isnan().tolist() == [True, False, False]
