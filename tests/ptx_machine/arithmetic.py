"""The arithmetic of a GPU on NumPy arrays: each result is rounded once, and a NaN has the bits that NVIDIA's have."""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np

Array = np.ndarray
F32, F64, I64, U16, U32, U64 = np.float32, np.float64, np.int64, np.uint16, np.uint32, np.uint64
NAN32 = np.array([0x7FFFFFFF], U32).view(F32)
NAN16 = U16(0x7FFF)
SMALLEST_NORMAL = np.finfo(F32).smallest_normal

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.fma.restype, _libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
_fma = np.frompyfunc(_libm.fma, 3, 1)


def canonical(x: Array) -> Array:
    """`x` with NVIDIA's NaN in place of others, of float32."""
    return np.where(np.isnan(x), NAN32, x) if x.dtype == F32 and np.isnan(x).any() else x


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, rounded once."""
    product = a.astype(F64) * b.astype(F64)  # exact
    addend = c.astype(F64)
    total = product + addend
    result = total.astype(F32)
    # Two roundings differ from one where the first makes a tie, or the result is subnormal.
    doubtful = ((total.view(I64) & 0x1FFFFFFF) == 0x10000000) | ((np.abs(result) <= SMALLEST_NORMAL) & (total != 0))
    if doubtful.any():
        result = np.where(doubtful, _rounded_to_odd(total, product, addend).astype(F32), result)
    return canonical(result)


def _rounded_to_odd(total: Array, a: Array, b: Array) -> Array:
    """a + b, of which `total` is the nearest float64, rounded to odd: a second rounding then does no harm."""
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = total.view(I64)
    change = (error != 0) & ((bits & 1) == 0) & np.isfinite(total)
    return np.where(change, np.where((error > 0) == (total > 0), bits | 1, bits - 1), bits).view(F64)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float64, rounded once: the C library's."""
    return np.asarray(_fma(a, b, c)).astype(F64)


def flush(x: Array) -> Array:
    """Zero, with its sign, in place of subnormal float32 numbers."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(F32(0), x), x)


def to_bfloat16(x: Array) -> Array:
    """The bits of the bfloat16 numbers nearest to float32 ones, ties to even."""
    bits = x.view(U32).astype(U64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(U16)
    return np.where(np.isnan(x), NAN16, rounded)


def from_bfloat16(bits: Array) -> Array:
    """bfloat16 numbers as float32."""
    return (bits.astype(U32) << 16).view(F32)


def to_float16(x: Array) -> Array:
    """The bits of the float16 numbers nearest to float32 or float64 ones."""
    return np.where(np.isnan(x), NAN16, x.astype(np.float16).view(U16))


def from_float16(bits: Array) -> Array:
    """float16 numbers as float32."""
    return bits.view(np.float16).astype(F32)


def larger(a: Array, b: Array, keep_nan: bool) -> Array:
    """The larger of two numbers; -0 is less than 0. Of a number and a NaN, the number, unless `keep_nan`."""
    chosen = np.where((a > b) | ((a == b) & ~np.signbit(a)), a, b)
    a_nan, b_nan = np.isnan(a), np.isnan(b)
    if not (a_nan | b_nan).any():
        return chosen
    nan = NAN32 if a.dtype == F32 else F64("nan")
    if keep_nan:
        return np.where(a_nan | b_nan, nan, chosen)
    return np.where(a_nan & b_nan, nan, np.where(a_nan, b, np.where(b_nan, a, chosen)))


# How far PTX lets float32 results of approximate instructions be off, in ulp: div.full and ex2.approx 2; sqrt.approx
# 2^-23 of the result, which is up to 2.
ALLOWED_ULPS = {"div": 2, "ex2": 2, "sqrt": 2}


class Approximate:
    """Results of approximate instructions.

    Args:
        seed: None for the nearest numbers; else results are off by random ulps, as many as PTX allows.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = None if seed is None else np.random.default_rng(seed)

    def __call__(self, opcode: str, exact: Array) -> Array:
        """A float32 result, from the result in float64."""
        x = canonical(exact.astype(F32))
        if self._random is not None:
            off = self._random.integers(-ALLOWED_ULPS[opcode], ALLOWED_ULPS[opcode] + 1, x.shape, np.int32)
            near = (x.view(np.int32) + off).view(F32)
            x = np.where(np.isfinite(x) & np.isfinite(near) & (np.abs(x) > 2 * SMALLEST_NORMAL), near, x)
        return x
