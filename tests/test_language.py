"""The words of rules: the columns agree, special values included, and a rule's torch form is the same function."""

from __future__ import annotations

import math

import pytest
import torch

triton = pytest.importorskip("triton", reason="the Triton column needs Triton")
import triton.language as tl
from triton_optim.kernels.language import PRIMITIVES, jit, maximum, sqrt, torch_form, where

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
    own = ["where", "bits_of", "number_of", "to_float", "to_int", "largest", "evens", "odds", "interleave"]
    assert sorted(PRIMITIVES) == sorted([*UNARY, *BINARY, *own])


@pytest.mark.parametrize("word", UNARY)
def test_unary_words_agree(word: str, device: torch.device) -> None:
    in_triton, in_torch = PRIMITIVES[word]
    x, _ = pairs(device)
    x = x[x.abs() != 1e-42] if word in ("log", "sqrt") else x  # a GPU's approximate forms flush denormals
    x = torch.cat([x, x.new_ones(128 - len(x))])
    out = torch.full_like(x, 7.0)
    _unary[(1,)](x, out, in_triton, 128)
    torch.testing.assert_close(out, in_torch(x), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("word", BINARY)
def test_binary_words_agree_and_keep_nan(word: str, device: torch.device) -> None:
    in_triton, in_torch = PRIMITIVES[word]
    x, y = pairs(device)
    out = torch.full_like(x, 7.0)
    _binary[(1,)](x, y, out, in_triton, 128)
    torch.testing.assert_close(out, in_torch(x, y), rtol=0, atol=0, equal_nan=True)
    assert out[x.isnan() | y.isnan()].isnan().all()


def test_where_agrees(device: torch.device) -> None:
    in_triton, in_torch = PRIMITIVES["where"]
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
    _round_trip[(1,)](x, bits, out, PRIMITIVES["bits_of"][0], PRIMITIVES["number_of"][0], 128)
    assert torch.equal(bits, PRIMITIVES["bits_of"][1](x))
    assert torch.equal(bits, PRIMITIVES["bits_of"][1](out))
    assert torch.equal(PRIMITIVES["number_of"][1](bits).view(torch.int32), x.view(torch.int32))


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
    names = ("largest", "evens", "odds", "interleave")
    most, even, odd, back = (x.new_zeros(8, n) for n in (1, 8, 8, 16))
    _row_words[(1,)](x, most, even, odd, back, *(PRIMITIVES[name][0] for name in names), 8, 16)
    in_torch = {name: PRIMITIVES[name][1] for name in names}
    torch.testing.assert_close(even, in_torch["evens"](x), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(odd, in_torch["odds"](x), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, x, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(in_torch["interleave"](x[:, ::2], x[:, 1::2]), x, rtol=0, atol=0, equal_nan=True)
    expected = in_torch["largest"](x)
    assert torch.equal(most.isfinite(), expected.isfinite())  # of a row with a NaN, NaN or Inf
    assert torch.equal(most[expected.isfinite()], expected[expected.isfinite()])


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


def test_trap_27_dynamo_does_not_find_triton_behind_a_rebound_rule() -> None:
    form = torch_form(outer)
    compiled = torch.compile(form, fullgraph=True, backend="eager")
    x, y = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 9.0])
    assert torch.equal(compiled(x, y), form(x, y))
