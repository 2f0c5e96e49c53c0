"""Stochastic rounding to 16 bits: up with the probability that makes the mean exact. The random bits are a hash of
counters, so that they are the same on every backend and after a resume, and nothing needs to be kept.
"""

from .language import abs, bits_of, floor, jit, number_of, where

MIXED_BY_ROLE = 0x09E3779B  # keeps the roles of an element apart; small, so that 12 of them stay 32-bit


@jit
def mix(x):
    """A hash of 32-bit integers, in which each bit depends on each: Wellons 2018, "lowbias32",
    https://nullprogram.com/blog/2018/07/31/. Shifts of signed integers repeat the sign, hence the masks.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


@jit
def round_bfloat16(x, bits):
    """A float32 whose lower half is 0. Inf and NaN stay; what is finite stays finite."""
    down = bits_of(x) & -0x10000
    up = number_of((bits_of(x) + (bits & 0xFFFF)) & -0x10000)
    rounded = where(abs(up) < float("inf"), up, number_of(down))
    return where(abs(x) < float("inf"), rounded, x)


@jit
def round_float16(x, bits):
    """A float32 that float16 holds too. Inf and NaN stay; what lies between two finite values stays between them."""
    random = bits & 0xFFFF
    down = number_of(bits_of(x) & -0x2000)
    up = number_of((bits_of(x) + (random >> 3)) & -0x2000)
    # Below 2^-14 there are the multiples of 2^-24.
    small = floor(abs(x) * 16777216.0 + random * (1.0 / 65536.0)) * (1.0 / 16777216.0)
    rounded = where(abs(up) > 65504.0, down, up)
    rounded = where(abs(x) < 6.103515625e-05, where(x < 0, -small, small), rounded)
    return where(abs(x) < float("inf"), rounded, x)
