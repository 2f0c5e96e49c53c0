"""How a value is kept in memory: as it is, with stochastic rounding, with a correction beside it, or as a code.

`decode` and `encode` are told a codec's name. What is kept comes and goes as a tuple of parts: floating-point ones as
float32, exact in the dtype that they are kept in, integers as int32, of which the lower 8 bits are kept. The random
bits are a hash of counters, so that they are the same on every backend and after a resume, and nothing of them needs
to be kept.

Blocks: a scale for each, float32 for 8-bit codes and bfloat16 for 4-bit ones, whose blocks are smaller; and a code for
each element, of which small ones have finer steps. Code k, between the powers of two P and 2 P, stands for
P^(s-1) ((2^s - 1) k - (2^s - 2) P) units: where k doubles, the value grows 2^s times, and in between it is linear. s is
2 for signed codes, whose 127 steps reach down to 6e-5 of the largest, and 3 for those of a second moment, whose 255
reach down to 6e-8. Both have less error than the dynamic code of Dettmers et al. 2022,
https://arxiv.org/abs/2110.02861, where a code that doubles means ten times the value; and a power of two takes neither
a table nor a logarithm. What is not 0 is never kept as 0 in the codes of a second moment: its root is divided by.
"""

from .language import (
    abs,
    absmax,
    bitcast_to_float,
    bitcast_to_int,
    evens,
    floor,
    interleave,
    jit,
    odds,
    to_float,
    to_int,
    where,
)

BLOCKS = {"int8": 256, "int4": 64}  # elements that share a scale


@jit
def mixed(x):
    """A hash of 32-bit integers, in which each bit depends on each: Wellons 2018, "lowbias32",
    https://nullprogram.com/blog/2018/07/31/. Shifts of signed integers repeat the sign, hence the masks.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


@jit
def row_key(low, high, step):
    """What the random bits of a row depend on: the halves of the seed, and the number of the update."""
    return mixed(mixed(mixed(low) + high) + step)


@jit
def tensor_key(row, number):
    """What those of the parameter of this number depend on: two hashes."""
    key = mixed(row + number)
    return key, mixed(key ^ 0x5BD1E995)


@jit
def hashed(low, high, key, key2):
    """32 random bits of an element: the halves of its index, multiplied, folded and multiplied again; constants of
    Wellons 2018, "lowbias32", https://nullprogram.com/blog/2018/07/31/. Shifts of signed integers repeat the sign,
    hence the mask.
    """
    x = (low + key) * 0x7FEB352D + (high * 0x2C1B3C6D + key2)
    return (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975


@jit
def bits_for(x, ROLE):
    """16 of the bits `x` for each role: its upper half, its lower, and those of further products."""
    if ROLE >= 2:
        # Wrapped to a signed 32-bit number: Triton takes no larger factor of an int32.
        x = (x ^ ((x >> 16) & 0xFFFF)) * ((0xFFEB352D + (ROLE // 2 - 1) * 0x1C9E3A6) % 0x100000000 - 0x80000000)
    if ROLE % 2 == 0:
        x = x >> 16
    return x & 0xFFFF


@jit
def stochastic_bfloat16(x, bits):
    """Up with the probability that makes the mean exact. Inf and NaN stay; what is finite stays finite."""
    return bitcast_to_float((bitcast_to_int(x) + where(abs(x) < 3.3895313892515355e38, bits, 0)) & -0x10000)


@jit
def stochastic_float16(x, bits):
    """Up with the probability that makes the mean exact, to a number of float16."""
    down = bitcast_to_float(bitcast_to_int(x) & -0x2000)
    up = bitcast_to_float((bitcast_to_int(x) + (bits >> 3)) & -0x2000)
    # Below 2^-14 there are the multiples of 2^-24.
    small = floor(abs(x) * 16777216.0 + to_float(bits) * (1.0 / 65536.0)) * (1.0 / 16777216.0)
    rounded = where(abs(up) > 65504.0, down, up)
    rounded = where(abs(x) < 6.103515625e-05, where(x < 0, -small, small), rounded)
    return where(abs(x) < float("inf"), rounded, x)


@jit
def nearest_bfloat16(x):
    """Ties away from 0: with those to even, 16 more bits could not tell both sides of a tie apart."""
    return where(x == x, bitcast_to_float((bitcast_to_int(x) + 0x8000) & -0x10000), x)


@jit
def step_float16(x):
    """The distance of float16 numbers of the size of `x`."""
    exponent = bitcast_to_int(x) & 0x7F800000
    return bitcast_to_float(where(exponent < 0x38800000, 0x33800000, exponent - 0x05000000))


@jit
def inverse_power(x):
    """1 / x for a power of two."""
    return bitcast_to_float(0x7F000000 - bitcast_to_int(x))


@jit
def nearest_float16(x):
    """The nearest number of float16; ties away from 0."""
    step = step_float16(x)
    size = floor(abs(x) * inverse_power(step) + 0.5) * step
    return where(abs(x) < float("inf"), with_sign(size, x), x)


@jit
def with_sign(size, x):
    """`size` with the sign bit of `x`."""
    return bitcast_to_float(bitcast_to_int(size) | (bitcast_to_int(x) & -0x80000000))


@jit
def units_float16(x, p):
    """By how much more `x` has than `p`, its nearest float16 number, in magnitude: in steps / 65536."""
    units = (abs(x) - abs(p)) * inverse_power(step_float16(p)) * 65536.0
    return where(abs(p) < 65520.0, units, 0.0)


@jit
def within(x, LOW, HIGH):
    """`x`, or the bound that it is beyond."""
    return where(x < LOW, LOW, where(x > HIGH, HIGH, x))


@jit
def with_units_float16(p, units):
    """A float16 number and so many steps / 65536 more, in magnitude."""
    return with_sign(abs(p) + to_float(units) * (step_float16(p) * (1.0 / 65536.0)), p)


@jit
def value_of_code(k, CODEC):
    """What a code k >= 0 stands for, in units of the block."""
    power = bitcast_to_float(bitcast_to_int(k) & 0x7F800000)
    if CODEC == "int8" or CODEC == "int4":
        value = power * (3.0 * k - 2.0 * power)
    else:
        value = power * power * (7.0 * k - 6.0 * power)
    return value


@jit
def code_of_value(x, CODEC):
    """The inverse, not yet rounded."""
    if CODEC == "int8" or CODEC == "int4":
        power = ((bitcast_to_int(x) >> 1) + 0x1FC00000) & 0x7F800000
        k = (x * bitcast_to_float(0x7F000000 - power) + 2.0 * bitcast_to_float(power)) * (1.0 / 3.0)
    else:
        power = (((bitcast_to_int(x) >> 23) * 171 + 43307) >> 9) << 23  # of a third of x's exponent, rounded down
        k = (x * bitcast_to_float(-0x41800000 - (power << 1)) + 6.0 * bitcast_to_float(power)) * (1.0 / 7.0)
    return where(x < 1.0, x, k)


@jit
def units(CODEC):
    """What the largest code stands for: 127, 255, 7 and 15."""
    return 16192.0 if CODEC == "int8" else 16662528.0 if CODEC == "uint8" else 52.0 if CODEC == "int4" else 3648.0


@jit
def largest_code(CODEC):
    """Of half a byte, with a sign or without."""
    return 7.0 if CODEC == "int4" else 15.0


@jit
def scale_of(x, CODEC):
    """What a unit of each block is; NaN where a value of the block is not finite, and then all of it is read as NaN."""
    size = absmax(x)
    scale = size * (1.0 / units(CODEC)) + (size - size)
    if CODEC == "int4" or CODEC == "uint4":
        # bfloat16, rounded up, so that the largest has a code; but what is a few ulp above one was that one.
        scale = where(scale == scale, bitcast_to_float((bitcast_to_int(scale) + 0xFF00) & -0x10000), scale)
    return scale


@jit
def codes_of(x, scale, part, CODEC):
    """The codes of a block's values, int32: rounded down, as the last step does, after `part` of a step was added."""
    k = code_of_value(abs(x) * (1.0 / (scale + 2e-38)), CODEC) + part  # a subnormal scale is 0 to some
    if CODEC == "int4" or CODEC == "uint4":
        k = where(k < largest_code(CODEC), k, largest_code(CODEC))
    signless = CODEC == "uint8" or CODEC == "uint4"
    k = where(x > 0, where(k < 1, 1.0, k), 0.0) if signless else with_sign(k, x)
    k = to_int(k)
    if CODEC == "int4" or CODEC == "uint4":
        k = (evens(k) & 15) | ((odds(k) & 15) << 4)
    return k


@jit
def value_of_codes(codes, scale, CODEC):
    """What codes stand for in float32, with the scale of their block."""
    if CODEC == "int8":
        k = to_float(codes)
    elif CODEC == "uint8":
        k = to_float(codes & 0xFF)
    elif CODEC == "int4":
        k = to_float(interleave((codes << 28) >> 28, (codes << 24) >> 28))
    else:
        k = to_float(interleave(codes & 15, (codes >> 4) & 15))
    if CODEC == "int8" or CODEC == "int4":
        value = with_sign(value_of_code(abs(k), CODEC), k)
    else:
        value = value_of_code(k, CODEC)
    return value * scale


@jit
def decode(parts, CODEC):
    """The value of what is kept."""
    value = parts[0]
    if CODEC == "master":
        value = parts[1]
    elif CODEC == "kahan bfloat16" or CODEC == "kahan float16":
        value = parts[0] + parts[1]
    elif CODEC == "split24 bfloat16":
        value = bitcast_to_float(bitcast_to_int(parts[0]) + (parts[1] << 8))
    elif CODEC == "split32 bfloat16":
        value = bitcast_to_float(bitcast_to_int(parts[0]) + (parts[1] << 8) + (parts[2] & 0xFF))
    elif CODEC == "split24 float16":
        value = with_units_float16(parts[0], parts[1] << 8)
    elif CODEC == "split32 float16":
        value = with_units_float16(parts[0], (parts[1] << 8) + (parts[2] & 0xFF))
    elif CODEC == "int8" or CODEC == "uint8" or CODEC == "int4" or CODEC == "uint4":
        value = value_of_codes(parts[0], parts[1], CODEC)
    return value


@jit
def encode(x, random, ROLE, CODEC):
    """What is kept of a value: a tuple of parts.

    Args:
        x: float32; for codes, a block along the last dimension.
        random: of `hashed`; read where the codec takes random bits.
        ROLE: the number of the result among the rule's.
    """
    parts = (x,)
    if CODEC == "stochastic bfloat16":
        parts = (stochastic_bfloat16(x, bits_for(random, ROLE)),)
    elif CODEC == "stochastic float16":
        parts = (stochastic_float16(x, bits_for(random, ROLE)),)
    elif CODEC == "master":
        parts = (x, x)
    elif CODEC == "kahan bfloat16":
        p = nearest_bfloat16(x)
        parts = (p, where(abs(p) < float("inf"), x - p, 0.0))
    elif CODEC == "kahan float16":
        p = nearest_float16(x)
        parts = (p, where(abs(p) < 65520.0, x - p, 0.0))
    elif CODEC == "split24 bfloat16":
        # Rounded to 24 bits first; these then split exactly.
        short = bitcast_to_float((bitcast_to_int(x) + (bits_for(random, ROLE) & 0xFF)) & -0x100)
        short = where(
            abs(x) < float("inf"),
            where(abs(short) < float("inf"), short, bitcast_to_float(bitcast_to_int(x) & -0x100)),
            x,
        )
        p = nearest_bfloat16(short)
        parts = (p, where(x == x, (bitcast_to_int(short) - bitcast_to_int(p)) >> 8, 0))
    elif CODEC == "split32 bfloat16":
        p = nearest_bfloat16(x)
        rest = where(x == x, bitcast_to_int(x) - bitcast_to_int(p), 0)
        parts = (p, rest >> 8, rest)
    elif CODEC == "split24 float16":
        unit = step_float16(x) * (1.0 / 256.0)
        short = floor(abs(x) * inverse_power(unit) + to_float(bits_for(random, ROLE)) * (1.0 / 65536.0)) * unit
        short = where(abs(x) < 65504.0, with_sign(short, x), x)
        p = nearest_float16(short)
        parts = (p, to_int(within(floor(units_float16(short, p) * (1.0 / 256.0)), -128.0, 127.0)))
    elif CODEC == "split32 float16":
        p = nearest_float16(x)
        rest = to_int(within(floor(units_float16(x, p) + 0.5), -32768.0, 32767.0))
        parts = (p, rest >> 8, rest)
    elif CODEC == "int8" or CODEC == "uint8" or CODEC == "int4" or CODEC == "uint4":
        scale = scale_of(x, CODEC)
        part = 0.5
        if CODEC == "int4" or CODEC == "uint4":
            part = to_float(bits_for(random, ROLE)) * (1.0 / 65536.0)
        parts = (codes_of(x, scale, part, CODEC), scale)
    return parts
