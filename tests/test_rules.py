"""A rule is one thing on every backend: what is no word of the language is refused before anything is made, with the
place and what to write instead; numbers are what they are in Python.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPP, TRITON_LOOPS
from own_rules import BACKENDS, F32, FACTOR, G, M, P, optimizer_of, stepped
from own_rules import defined as defined
from torch.nn import Parameter

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

tl = language.tl
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
    ("g = g * m.lr", "m.lr", "the scalars last"),
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


def test_a_rule_that_nests_too_deeply(defined: Any) -> None:
    rule, _ = defined("g = " + "abs(" * 80 + "g" + ")" * 80)
    straight(rule)
    rule, _ = defined("g = g" + " + g" * 1500)
    with pytest.raises(RuleError, match="Give parts of it names"):
        straight(rule)


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
