"""The machine that executes PTX: its instructions, against integers, fractions and the C library."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import random
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx_machine import arithmetic
from ptx_machine.executor import parameters
from ptx_programs import LANES, U32, faults, stored

INF, NAN = math.inf, math.nan
libm = ctypes.CDLL(ctypes.util.find_library("m"))
libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3


REGISTERS = {"b16": ("%rs", 2), "b32": ("%r", 4), "b64": ("%rd", 8)}
Bits = tuple[str, int]  # the type of a register, and what it holds


def result(opcode: str, *operands: Bits | int, to: str = "b32") -> int:
    """What an instruction makes of constants, unsigned; of a predicate 1 or 0."""
    lines, names = [], []
    for i, value in enumerate(operands):
        if isinstance(value, int):
            names.append(str(value))
            continue
        kind, bits = value
        names.append(f"{REGISTERS[kind][0]}{i + 4}")
        lines.append(f"mov.{kind} {names[-1]}, {bits:#x};")
    target = "%p1" if to == "pred" else f"{REGISTERS[to][0]}2"
    lines.append(f"{opcode} {target}, {', '.join(names)};")
    kind = "b32" if to == "pred" else to
    register, width = REGISTERS[kind]
    if to == "pred":
        lines.append("selp.b32 %r2, 1, 0, %p1;")
    lines.append(f"st.global.{kind} [%rd0], {register}2;")
    out = np.zeros(1, np.uint64)
    assert not faults("\n".join(lines), out)
    return int.from_bytes(out.tobytes()[:width], "little")


def b32(x: int) -> Bits:
    return ("b32", x)


def f32(x: float) -> Bits:
    return ("b32", bits32(x))


def f64(x: float) -> Bits:
    return ("b64", struct.unpack("<Q", struct.pack("<d", x))[0])


def bits32(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def signed(x: int, width: int = 32) -> int:
    return x - (x >> (width - 1) << width)


# Numbers.


def fmaf(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.array([libm.fmaf(*given) for given in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)], np.float32)


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    both_nan = np.isnan(got) & np.isnan(expected)
    assert ((got.view(U32) == expected.view(U32)) | both_nan).all()


@pytest.mark.parametrize("scale", [1, 2.0**-60, 2.0**-75, 2.0**-100, 2.0**40])
def test_fused_multiply_add_of_numbers_of_like_size(scale: float) -> None:
    rng = np.random.default_rng(0)
    x, y, z = (rng.standard_normal(20_000).astype(np.float32) for _ in range(3))
    x = x * np.float32(scale)
    z = (z * x * y * np.float32(2.0) ** rng.integers(-30, 30, len(z)).astype(np.float32)).astype(np.float32)
    assert_same_bits(arithmetic.fma32(x, y, z), fmaf(x, y, z))


def test_fused_multiply_add_of_any_bits() -> None:
    rng = np.random.default_rng(0)
    x, y, z = rng.integers(0, 2**32, (3, 50_000), dtype=np.uint64).astype(U32).view(np.float32)
    with np.errstate(all="ignore"):
        assert_same_bits(arithmetic.fma32(x, y, z), fmaf(x, y, z))


@pytest.mark.parametrize("subnormal", [False, True])
def test_fused_multiply_add_where_two_roundings_are_wrong(subnormal: bool) -> None:
    """Sums that float64 rounds to a tie of float32's: near 1, and where the result is subnormal."""
    rng = np.random.default_rng(0)
    k, sign = rng.integers(1, 200, (2, 20_000)), rng.choice([-1.0, 1.0], (3, 20_000))
    odd = 2 * rng.integers(2**21, 2**22, 20_000) + 1
    half, addend = (2.0**-75, odd * 2.0**-149) if subnormal else (2.0**-12, 1 + k[1] * 2.0**-23)
    x = (half * (1 + sign[0] * k[0] * 2.0**-23)).astype(np.float32)
    y = (sign[1] * half * (1 - sign[0] * k[0] * 2.0**-23)).astype(np.float32)
    z = (sign[2] * addend).astype(np.float32)
    expected = fmaf(x, y, z)
    assert ((x.astype(np.float64) * y + z).astype(np.float32) != expected).sum() > 100
    assert_same_bits(arithmetic.fma32(x, y, z), expected)


def nearest(x: Fraction, digits: int) -> Fraction:
    """The nearest number of so many binary digits, ties to even; of a magnitude that has as many everywhere."""
    exponent = math.frexp(float(x))[1] - digits
    return round(x / Fraction(2) ** exponent) * Fraction(2) ** exponent  # Python rounds ties to even


def test_instructions_round_to_the_nearest() -> None:
    rng = random.Random(0)
    for _ in range(200):
        x, y, z = (struct.unpack("<f", struct.pack("<f", rng.uniform(-4, 4)))[0] for _ in range(3))
        exact = {
            "fma.rn.f32": Fraction(x) * Fraction(y) + Fraction(z),
            "mul.f32": Fraction(x) * Fraction(y),
            "add.f32": Fraction(x) + Fraction(y),
            "sub.f32": Fraction(x) - Fraction(y),
            "div.full.f32": Fraction(x) / Fraction(y),
        }
        for opcode, value in exact.items():
            given = (x, y, z) if opcode.startswith("fma") else (x, y)
            assert result(opcode, *map(f32, given)) == bits32(float(nearest(value, 24))), (opcode, given)
        root = struct.unpack("<f", struct.pack("<I", result("sqrt.rn.f32", f32(abs(x)))))[0]
        above, below = (Fraction(root) + Fraction(math.ulp(root)) * 2**28 * sign for sign in (1, -1))  # half an ulp
        assert below**2 <= Fraction(abs(x)) <= above**2


def test_fused_multiply_add_of_float64_is_rounded_once() -> None:
    x = 1 + 2.0**-52
    assert result("fma.rn.f64", f64(x), f64(x), f64(-1 - 2.0**-51), to="b64") == f64(2.0**-104)[1]


def test_bfloat16_is_rounded_to_the_nearest_ties_to_even() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 90_000, dtype=np.uint64).astype(U32)
    bits[:30_000] = (bits[:30_000] & 0xFFFF0000) | np.repeat(np.array([0x7FFF, 0x8000, 0x8001], U32), 10_000)
    x = bits.view(np.float32)
    expected = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(x)
    assert (arithmetic.to_bfloat16(x)[number] == expected[number]).all()
    assert (arithmetic.to_bfloat16(x)[~number] == 0x7FFF).all()


SPECIAL = [
    ("add.f32", (f32(INF), f32(-INF)), 0x7FFFFFFF),
    ("mul.f32", (f32(0.0), f32(INF)), 0x7FFFFFFF),
    ("max.f32", (f32(NAN), f32(1.0)), bits32(1.0)),
    ("max.NaN.f32", (f32(NAN), f32(1.0)), 0x7FFFFFFF),
    ("max.f32", (f32(-0.0), f32(0.0)), 0),
    ("max.f32", (f32(1.0), f32(3.0), f32(2.0)), bits32(3.0)),
    ("min.f32", (f32(0.0), f32(-0.0)), 0x80000000),
    ("min.f32", (f32(NAN), f32(1.0)), bits32(1.0)),
    ("sqrt.rn.f32", (f32(-1.0),), 0x7FFFFFFF),
    ("sqrt.rn.f32", (b32(0x00000004),), bits32(math.sqrt(2.0**-147))),
    ("sqrt.approx.ftz.f32", (b32(0x00400000),), 0),
    ("sqrt.approx.ftz.f32", (b32(0x80400000),), 0x80000000),
    ("mul.f32", (f32(1e-20), f32(1e-20)), bits32(1e-40)),
    ("mul.ftz.f32", (f32(1e-20), f32(1e-20)), 0),
    ("ex2.approx.ftz.f32", (f32(-3.0),), bits32(0.125)),
    ("abs.f32", (f32(-2.0),), bits32(2.0)),
    ("neg.f32", (f32(0.0),), 0x80000000),
    ("abs.bf16x2", (b32(0xBF80C000),), 0x3F804000),
    ("sub.rn.f32.bf16", (("b16", 0x3FC0), f32(2.5 + 2.0**-20)), bits32(-1.0 - 2.0**-20)),
    ("add.f32.f16", (("b16", 0x3E00), f32(2.0**-20)), bits32(1.5 + 2.0**-20)),
    ("fma.rn.f32.bf16", (("b16", 0x3FC0), ("b16", 0x4000), f32(2.0**-20)), bits32(3.0 + 2.0**-20)),
    ("cvt.rn.bf16x2.f32", (f32(1.0), f32(2.0)), 0x3F804000),
    ("cvt.rn.f16x2.f32", (f32(1.0), f32(65520.0)), 0x3C007C00),
    ("cvt.rmi.f32.f32", (f32(-1.5),), bits32(-2.0)),
    ("cvt.rn.f32.s32", (b32(0xFFFFFFFF),), bits32(-1.0)),
    ("cvt.rn.f32.u32", (b32(16777217),), bits32(16777216.0)),
    *(("cvt.rzi.s32.f32", (f32(x),), y % 2**32) for x, y in ((1.9, 1), (-1.9, -1), (3e9, 2**31 - 1), (-3e9, -(2**31)))),
    *(("cvt.rzi.s32.f32", (f32(x),), y) for x, y in ((INF, 2**31 - 1), (NAN, 0))),
]


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"), SPECIAL, ids=[f"{i}-{s[0]}" for i, s in enumerate(SPECIAL)]
)
def test_special_numbers(opcode: str, operands: tuple[Bits, ...], expected: int) -> None:
    got = result(opcode, *operands)
    assert got == expected, f"{got:#x}"


@pytest.mark.parametrize("pair", [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (NAN, 1.0)], ids=str)
def test_comparisons(pair: tuple[float, float]) -> None:
    x, y = pair
    plain = {"eq": x == y, "ne": x < y or x > y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}
    unordered = {f"{name}u": holds or x != x for name, holds in plain.items()}
    for name, holds in {**plain, **unordered, "num": x == x, "nan": x != x}.items():
        assert result(f"setp.{name}.f32", f32(x), f32(y), to="pred") == holds, name
        assert result(f"setp.{name}.f64", f64(x), f64(y), to="pred") == holds, name


# Integers and bits.


def test_integers() -> None:
    rng = random.Random(0)
    for _ in range(40):
        x, y, z = (rng.getrandbits(32) for _ in range(3))
        sx, sy, n = signed(x), signed(y), rng.randrange(40)
        start, length = rng.randrange(16), rng.randrange(1, 16)
        field = x >> start & ((1 << length) - 1)
        selectors = rng.getrandbits(16)
        both = (y << 32 | x).to_bytes(8, "little")
        chosen = [(both[k & 7], k & 8) for k in (selectors >> 4 * i & 15 for i in range(4))]
        picked = bytes((0xFF if byte & 0x80 else 0) if sign else byte for byte, sign in chosen)
        a, b, c = b32(x), b32(y), b32(z)
        wide = ("b64", y << 20)
        for got, expected in (
            (result("add.s32", a, b), x + y),
            (result("sub.s32", a, b), x - y),
            (result("mul.lo.s32", a, b), x * y),
            (result("mad.lo.s32", a, b, c), x * y + z),
            (result("min.u32", a, b), min(x, y)),
            (result("max.s32", a, b), max(sx, sy)),
            (result("and.b32", a, b), x & y),
            (result("or.b32", a, b), x | y),
            (result("xor.b32", a, b), x ^ y),
            (result("shl.b32", a, n), x << n),
            (result("shr.u32", a, n), x >> n),
            (result("shr.s32", a, n), sx >> n),
            (result("bfe.u32", a, start, length), field),
            (result("bfe.s32", a, start, length), signed(field, length)),
            (result("prmt.b32", a, b, selectors), int.from_bytes(picked, "little")),
            (result("popc.b32", a), x.bit_count()),
            (result("cvt.s32.s8", a), signed(x & 0xFF, 8)),
        ):
            assert got == expected % 2**32
        for got, expected in (
            (result("mul.wide.s32", a, b, to="b64"), sx * sy),
            (result("mul.wide.u32", a, b, to="b64"), x * y),
            (result("mad.wide.s32", a, b, wide, to="b64"), sx * sy + (y << 20)),
            (result("cvt.u64.u32", a, to="b64"), x),
            (result("cvt.s64.s32", a, to="b64"), sx),
            (result("shl.b64", ("b64", x), n + 20, to="b64"), x << (n + 20)),
        ):
            assert got == expected % 2**64
        assert result("setp.lt.s32", a, b, to="pred") == (sx < sy)
        assert result("setp.lt.u32", a, b, to="pred") == (x < y)


def test_a_modifier_that_is_not_known_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"'sat'.* of add\.sat\.f32"):
        result("add.sat.f32", f32(1.0), f32(2.0))
    for opcode in ("add.bf16", "sub.f16", "mul.bf16", "fma.rn.bf16", "max.bf16"):
        with pytest.raises(NotImplementedError, match=rf"computes nothing in 16 bits: {opcode}"):
            result(opcode, *[("b16", 0x3F80)] * (3 if opcode.startswith("fma") else 2), to="b16")
    with pytest.raises(NotImplementedError, match="the machine does not know lop3"):
        result("lop3.b32", b32(1), b32(2), b32(3), 4)


def test_approximate_functions_are_off_by_no_more_than_ptx_allows() -> None:
    exact = np.linspace(1.1, 1.9, 10_000)
    nearest_one = arithmetic.Approximate()("div", exact)
    assert (nearest_one == exact.astype(np.float32)).all()
    off = arithmetic.Approximate(seed=1)("div", exact).view(np.int32) - nearest_one.view(np.int32)
    assert set(off.tolist()) == {-2, -1, 0, 1, 2}


def test_pieces_of_registers() -> None:
    taken = "cvt.u64.u32 %rd3, %r0;\nshl.b64 %rd3, %rd3, 32;\nmov.b64 {%r2, %r1}, %rd3;"
    assert (stored(taken) == LANES).all()
    assert (stored("cvt.u16.u32 %rs1, %r0;\nmov.b32 %r1, {%rs1, %rs1};") == LANES * 0x10001).all()


def test_registers_of_inline_assembly() -> None:
    """Two of one name, of different sizes."""
    scoped = """cvt.u64.u32 %rd3, %r0;
	shl.b64 %rd3, %rd3, 32;
	{.reg .b32 tmp; mov.b64 {tmp, %r1}, %rd3; }
	{.reg .b64 tmp; mov.b64 tmp, %rd1; st.global.b32 [tmp], %r1; }"""
    assert (stored(scoped) == LANES).all()


def test_predicates() -> None:
    odd = "and.b32 %r2, %r0, 1;\nsetp.eq.b32 %p1, %r2, 1;\nmov.b32 %r1, 5;\n"
    assert (stored(odd + "@%p1 mov.b32 %r1, 9;") == np.where(LANES % 2, 9, 5)).all()
    assert (stored(odd + "@!%p1 mov.b32 %r1, 9;") == np.where(LANES % 2, 5, 9)).all()
    assert (stored(odd + "selp.b32 %r1, 7, 8, %p1;") == np.where(LANES % 2, 7, 8)).all()


def test_arguments_become_parameters() -> None:
    tensor = torch.zeros(3)
    signature = ["*fp32", "*i64", ("fp32", "constexpr", ("fp32",)), "i32", "constexpr", "fp64", "*i8"]
    given = [tensor, 4096, (1.0, "anything", (-2.0,)), -1, object(), 0.5, None]
    expected = [tensor.data_ptr(), 4096, bits32(1.0), bits32(-2.0), -1, f64(0.5)[1], 0]
    assert list(parameters(signature, given)) == expected
    with pytest.raises(NotImplementedError, match="bf16"):
        list(parameters(["bf16"], [1.0]))
