"""The words of rules: the columns agree, special values included, and a rule's torch form is the same function."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from conftest import CPP

triton = pytest.importorskip("triton", reason="the Triton column needs Triton")
import triton.language as tl

import triton_optim
from triton_optim import RuleOptimizer
from triton_optim.backends.cpp import bucket as cpp_backend
from triton_optim.backends.cpp import build_ahead
from triton_optim.backends.cpp import translation as cpp_translation
from triton_optim.kernels.language import (
    PRIMITIVES,
    abs,
    absmax,
    bitcast_to_float,
    bitcast_to_int,
    evens,
    exp,
    interleave,
    jit,
    log,
    maximum,
    minimum,
    odds,
    sign,
    sqrt,
    to_float,
    to_int,
    torch_form,
    where,
)
from triton_optim.kernels.lines import WORDS

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.5, 1e-30, -1e30, math.inf, -math.inf, math.nan, 1e-42]
UNARY = ["abs", "exp", "floor", "log", "sign", "sqrt"]
BINARY = ["maximum", "minimum"]


@triton.jit
def _unary(x, out, WORD: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, WORD(tl.load(x + i)))


@triton.jit
def _binary(x, y, out, WORD: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, WORD(tl.load(x + i), tl.load(y + i)))


@triton.jit
def _where(x, y, out, WORD: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(out + i, WORD(a > b, a, b))


def pairs(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    grid = torch.tensor([[a, b] for a in SPECIAL for b in SPECIAL] + [[0.5, 0.25]] * 7, device=device)
    assert len(grid) == 128
    return grid[:, 0].contiguous(), grid[:, 1].contiguous()


def test_every_word_is_tested() -> None:
    own = [
        "where",
        "like",
        "bitcast_to_int",
        "bitcast_to_float",
        "to_float",
        "to_int",
        "absmax",
        "evens",
        "odds",
        "interleave",
    ]
    assert sorted(PRIMITIVES) == sorted([*UNARY, *BINARY, *own])
    assert sorted(WORDS) == sorted([*UNARY, *BINARY, "where"])


@pytest.mark.parametrize("word", UNARY)
def test_unary_words_agree(word: str, device: torch.device) -> None:
    in_triton, in_torch, _ = PRIMITIVES[word]
    x, _ = pairs(device)
    x = x[x.abs() != 1e-42] if word == "log" else x  # a GPU's is approximate, and flushes subnormals
    x = torch.cat([x, x.new_ones(128 - len(x))])
    out = torch.full_like(x, 7.0)
    _unary[(1,)](x, out, in_triton, 128)
    torch.testing.assert_close(out, in_torch(x), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("word", BINARY)
def test_binary_words_agree_and_keep_nan(word: str, device: torch.device) -> None:
    in_triton, in_torch, _ = PRIMITIVES[word]
    x, y = pairs(device)
    out = torch.full_like(x, 7.0)
    _binary[(1,)](x, y, out, in_triton, 128)
    torch.testing.assert_close(out, in_torch(x, y), rtol=0, atol=0, equal_nan=True)
    assert out[x.isnan() | y.isnan()].isnan().all()


def test_where_agrees(device: torch.device) -> None:
    in_triton, in_torch, _ = PRIMITIVES["where"]
    x, y = pairs(device)
    out = torch.full_like(x, 7.0)
    _where[(1,)](x, y, out, in_triton, 128)
    torch.testing.assert_close(out, in_torch(x > y, x, y), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _round_trip(x, bits, out, BITS_OF: tl.constexpr, NUMBER_OF: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    found = BITS_OF(tl.load(x + i))
    tl.store(bits + i, found)
    tl.store(out + i, NUMBER_OF(found))


def test_bits_agree_and_give_the_number_back(device: torch.device) -> None:
    x, _ = pairs(device)
    bits, out = torch.zeros(128, dtype=torch.int32, device=device), torch.zeros_like(x)
    _round_trip[(1,)](x, bits, out, PRIMITIVES["bitcast_to_int"][0], PRIMITIVES["bitcast_to_float"][0], 128)
    assert torch.equal(bits, PRIMITIVES["bitcast_to_int"][1](x))
    assert torch.equal(bits, PRIMITIVES["bitcast_to_int"][1](out))
    assert torch.equal(PRIMITIVES["bitcast_to_float"][1](bits).view(torch.int32), x.view(torch.int32))


@triton.jit
def _converted(x, ints, floats, TO_INT: tl.constexpr, TO_FLOAT: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    found = TO_INT(tl.load(x + i))
    tl.store(ints + i, found)
    tl.store(floats + i, TO_FLOAT(found))


def test_conversions_agree(device: torch.device) -> None:
    """To an int, toward 0."""
    x = torch.linspace(-70000.7, 70000.7, 128, device=device)
    x[:4] = torch.tensor([0.0, -0.9, 0.9, -1.0])
    ints, floats = torch.zeros(128, dtype=torch.int32, device=device), torch.zeros_like(x)
    _converted[(1,)](x, ints, floats, PRIMITIVES["to_int"][0], PRIMITIVES["to_float"][0], 128)
    assert torch.equal(ints, PRIMITIVES["to_int"][1](x))
    assert torch.equal(ints, x.trunc().int())
    assert torch.equal(floats, PRIMITIVES["to_float"][1](ints))
    assert torch.equal(floats, x.trunc())


@triton.jit
def _row_words(
    x, most, even, odd, back,
    LARGEST: tl.constexpr, EVENS: tl.constexpr, ODDS: tl.constexpr, INTERLEAVE: tl.constexpr,
    ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)[:, None]
    places, half = rows * N + tl.arange(0, N)[None, :], rows * (N // 2) + tl.arange(0, N // 2)[None, :]
    values = tl.load(x + places)
    tl.store(most + rows, LARGEST(values))
    tl.store(even + half, EVENS(values))
    tl.store(odd + half, ODDS(values))
    tl.store(back + places, INTERLEAVE(EVENS(values), ODDS(values)))


def test_words_for_rows_agree(device: torch.device) -> None:
    x = torch.arange(8 * 16, dtype=torch.float32, device=device).sin().view(8, 16)
    x[1, 5], x[2, 0], x[3, 15] = math.nan, math.inf, -math.inf
    names = ("absmax", "evens", "odds", "interleave")
    most, even, odd, back = (x.new_zeros(8, n) for n in (1, 8, 8, 16))
    _row_words[(1,)](x, most, even, odd, back, *(PRIMITIVES[name][0] for name in names), 8, 16)
    in_torch = {name: PRIMITIVES[name][1] for name in names}
    torch.testing.assert_close(even, in_torch["evens"](x), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(odd, in_torch["odds"](x), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, x, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(in_torch["interleave"](x[:, ::2], x[:, 1::2]), x, rtol=0, atol=0, equal_nan=True)
    expected = in_torch["absmax"](x)
    assert torch.equal(most.isfinite(), expected.isfinite())  # of a row with a NaN, NaN or Inf
    assert torch.equal(most[expected.isfinite()], expected[expected.isfinite()])


# The C++ column, in rules.


class NoScalars(NamedTuple):
    pass


class OfRule(RuleOptimizer):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {}, **options)

    def scalars(self, group: dict[str, Any], step: Any) -> NoScalars:
        return NoScalars()


@jit
def _takes_abs(p, g, h):
    return (abs(p),)


@jit
def _takes_exp(p, g, h):
    return (exp(p),)


@jit
def _takes_floor(p, g, h):
    return (tl.floor(p),)


@jit
def _takes_log(p, g, h):
    return (log(p),)


@jit
def _takes_sign(p, g, h):
    return (sign(p),)


@jit
def _takes_sqrt(p, g, h):
    return (sqrt(p),)


@jit
def _takes_maximum(p, g, h):
    return (maximum(p, g),)


@jit
def _takes_minimum(p, g, h):
    return (minimum(p, g),)


@jit
def _takes_where(p, g, h):
    return (where(p > g, p, g),)


IN_RULES = {
    "abs": _takes_abs, "exp": _takes_exp, "floor": _takes_floor, "log": _takes_log, "sign": _takes_sign,
    "sqrt": _takes_sqrt, "maximum": _takes_maximum, "minimum": _takes_minimum, "where": _takes_where,
}  # fmt: skip


def in_cpp(rule: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    p = torch.nn.Parameter(x.clone())
    p.grad = y.clone()
    type("OfRule", (OfRule,), {"rule": rule})([p], backend="cpp").step()
    return p.detach()


@CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("word", IN_RULES)
def test_words_agree_in_cpp(word: str, dtype: torch.dtype) -> None:
    assert sorted(IN_RULES) == sorted([*UNARY, *BINARY, "where"])
    x, y = (t.to(dtype) for t in pairs(torch.device("cpu")))
    in_torch = PRIMITIVES[word][1]
    expected = in_torch(x > y, x, y) if word == "where" else in_torch(x, y) if word in BINARY else in_torch(x)
    # torch's own exponentials, logarithms and roots are those of a library that rounds otherwise.
    rtol = {torch.float32: 3e-7, torch.float64: 5e-16}[dtype] if word in ("exp", "log", "sqrt") else 0
    torch.testing.assert_close(in_cpp(IN_RULES[word], x, y), expected, rtol=rtol, atol=0, equal_nan=True)


@jit
def _sum(p, g, h):
    return (p + g,)


@jit
def _through_bits(parts, CODEC):
    return bitcast_to_float(bitcast_to_int(parts[0]) + 0)


@jit
def _through_ints(parts, CODEC):
    return to_float(to_int(parts[0]))


def in_place_of_the_codecs(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Nothing that is made of them is kept."""
    for name, function in functions.items():
        monkeypatch.setattr(cpp_translation, name, function)
    for name in ("source", "step_of"):
        monkeypatch.setattr(cpp_backend, name, getattr(cpp_backend, name).__wrapped__)
    monkeypatch.setattr(build_ahead, "start", lambda *_: None)


@CPP
@pytest.mark.parametrize("decode", [_through_bits, _through_ints], ids=["bits", "conversions"])
def test_bits_and_conversions_agree_in_cpp(decode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a codec: rules have no such words."""
    in_place_of_the_codecs(monkeypatch, decode=decode)
    x, y = pairs(torch.device("cpu"))
    if decode is _through_ints:
        x, y = torch.linspace(-70000.7, 70000.7, 128), torch.linspace(-3.0, 3.0, 128)
        expected = x.trunc() + y.trunc()
    else:
        expected = x + y
    torch.testing.assert_close(in_cpp(_sum, x, y), expected, rtol=0, atol=0, equal_nan=True)


@jit
def _decode_rows(parts, CODEC):
    value = parts[0]
    if CODEC == "int4":
        value = interleave(to_float(parts[0]) + 3.0, to_float(parts[0]) + 5.0)
    return value


@jit
def _encode_rows(x, random, ROLE, CODEC):
    parts = (x,)
    if CODEC == "int4":
        parts = (to_int(evens(x)) + 2 * to_int(odds(x)), absmax(x))
    return parts


@CPP
def test_words_for_rows_agree_in_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the codecs: pairs, and the largest of each block."""
    in_place_of_the_codecs(monkeypatch, decode=_decode_rows, encode=_encode_rows)
    p = torch.nn.Parameter(torch.zeros(4096 + 64))
    p.grad = torch.zeros_like(p)
    p.grad[0], p.grad[65], p.grad[130] = 8.0, math.nan, -math.inf
    optimizer = triton_optim.Lion([p], betas=(0.5, 0.5), state_dtype="int4", backend="cpp")
    optimizer.step()
    # Half of 3 and 5, and half of the gradient.
    x = (torch.tensor([1.5, 2.5]).repeat(len(p) // 2) + 0.5 * p.grad).view(-1, 64)
    state = optimizer.state[p]
    words = {name: PRIMITIVES[name][1] for name in ("evens", "odds", "absmax", "to_int")}
    expected = words["to_int"](words["evens"](x)) + 2 * words["to_int"](words["odds"](x))
    assert torch.equal(state["exp_avg"].view(-1, 32)[[0, *range(3, 65)]], expected.to(torch.int8)[[0, *range(3, 65)]])
    found, largest_of = state["exp_avg_scale"].float().view(-1, 1), words["absmax"](x)
    assert torch.equal(found.isfinite(), largest_of.isfinite())
    assert torch.equal(found[found.isfinite()], largest_of[found.isfinite()])


FACTOR = tl.constexpr(3.0)


@jit
def inner(x):
    return sqrt(x) * FACTOR


@jit
def outer(x, y):
    return where(x > y, inner(x), maximum(x, y))


@triton.jit
def with_tl(x, y):
    return tl.where(x > y, tl.sqrt(x), tl.maximum(x, y))


def test_torch_form_follows_calls_and_constants() -> None:
    x, y = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 9.0])
    assert torch_form(outer)(x, y).tolist() == [6.0, 9.0]


def test_torch_form_of_tl_words() -> None:
    x, y = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 9.0])
    assert torch_form(with_tl)(x, y).tolist() == [2.0, 9.0]


def test_torch_form_refuses_what_is_no_function() -> None:
    with pytest.raises(TypeError, match="must be a @jit function"):
        torch_form("adam")


def test_dynamo_does_not_find_triton_behind_a_rebound_rule() -> None:
    form = torch_form(outer)
    compiled = torch.compile(form, fullgraph=True, backend="eager")
    x, y = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 9.0])
    assert torch.equal(compiled(x, y), form(x, y))
