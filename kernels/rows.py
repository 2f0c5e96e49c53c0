"""The scalars of a step, formed on the device from numbers that the host does not know.

What `scalars` does to its numbers was recorded: a list of operations a row. A program evaluates those of one row, all
at once and again and again: after as many passes as the longest chain of operations has, every value is right.
"""

import triton
import triton.language as tl

from .codecs import row_key
from .gradient_norm import stats_of, store_stats
from .language import maximum, minimum

# Where a value comes from: a constant, an address, or an operation on up to three others.
KINDS = ("constant", "read32", "read64", "add", "sub", "mul", "div", "pow", "min", "max", "lt", "le", "eq", "where")
KINDS += ("sqrt", "exp", "log", "abs", "floor", "float32")
_CONSTANT, _READ32, _READ64, _ADD, _SUB, _MUL, _DIV, _POW, _MIN, _MAX, _LT, _LE, _EQ, _WHERE = map(
    tl.constexpr, range(14)
)
_SQRT, _EXP, _LOG, _ABS, _FLOOR, _FLOAT32 = map(tl.constexpr, range(14, 20))

# Where a value goes: to a cell of the row, or nowhere, or to addresses that follow each other, or into the key of the
# row's random bits: the halves of the seed, and the number of the update.
NOWHERE, KEPT32, KEPT64, LOW, HIGH, STEP = -1, -2, -3, -4, -5, -6
_KEPT32, _KEPT64, _LOW, _HIGH, _STEP = map(tl.constexpr, (KEPT32, KEPT64, LOW, HIGH, STEP))

COPIES = tl.constexpr(256)  # that are written at a time


@triton.jit
def power(x, y):
    """x ** y in float64, within some |y log x| ulp."""
    value = tl.exp(y * tl.log(tl.abs(x)))
    whole = tl.floor(y) == y
    odd = tl.floor(y * 0.5) * 2.0 != y
    value = tl.where(x < 0, tl.where(whole, tl.where(odd, -value, value), float("nan")), value)
    return tl.where(y == 0, 1.0, value)


@triton.jit(do_not_specialize=["count", "max_norm", "grad_scale", "found_inf"])
def form_rows(
    code,
    memory,
    rows,
    keys,
    stats,
    partials,
    count,
    max_norm,
    grad_scale,
    found_inf,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    STATS: tl.constexpr,
    RANDOM: tl.constexpr,
    KIND: tl.constexpr,
    SCALED: tl.constexpr,
    FOUND: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Form one row, and bring the numbers that are kept to where they are after the step.

    Args:
        code: int32 ``(rows, 6, SLOTS)``: a value's kind, the numbers of the three values it is made of (of the first
            value, a constant, the second of these is how many passes to make, the third how many copies to keep), and
            where it goes: a cell of the row, or one of the constants above; then the numbers of the KEPT values that
            are kept.
        memory: int64 ``(rows, 2, SLOTS)``: the bits of a constant or the address it is read from; the address its
            copies go to.
        rows: ``(rows, WIDTH)``, what is formed.
        keys: int32 ``(rows,)``: what the random bits of a row depend on. Not written unless RANDOM.
        stats: float64 ``(4,)``, whose second is whether the step is skipped (not 0).
        partials, count, max_norm, grad_scale, found_inf: as of `gradient_stats`, of which the stats are formed.
        WIDTH: cells of a row. SLOTS: values of a row, a power of 2.
        STATS: "none" where there is none, "read" where there is, "form" where it is to be written here.
        RANDOM: whether to form keys.
        KIND, SCALED, FOUND, SKIP, BLOCK: as of `gradient_stats`. Not looked at unless STATS is "form".
        KEPT: values that are kept.
    """
    row = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    code += row * 6 * SLOTS
    memory += row * 2 * SLOTS
    kind = tl.load(code + slot)
    first = tl.load(code + SLOTS + slot)
    second = tl.load(code + 2 * SLOTS + slot)
    third = tl.load(code + 3 * SLOTS + slot)
    goes = tl.load(code + 4 * SLOTS + slot)
    source = tl.load(memory + slot)
    kept = tl.load(memory + SLOTS + slot)
    narrow = tl.load(source.to(tl.pointer_type(tl.float32)), mask=kind == _READ32, other=0.0).to(tl.float64)
    wide = tl.load(source.to(tl.pointer_type(tl.float64)), mask=kind == _READ64, other=0.0)
    start = tl.where(kind == _CONSTANT, source.to(tl.float64, bitcast=True), tl.where(kind == _READ32, narrow, wide))
    value = start
    for _ in range(tl.load(code + 2 * SLOTS)):
        x = tl.gather(value, first, 0)
        y = tl.gather(value, second, 0)
        z = tl.gather(value, third, 0)
        new = tl.where(kind <= _READ64, start, x + y)
        new = tl.where(kind == _SUB, x - y, new)
        new = tl.where(kind == _MUL, x * y, new)
        new = tl.where(kind == _DIV, x / y, new)
        new = tl.where(kind == _POW, power(x, y), new)
        new = tl.where(kind == _MIN, minimum(x, y), new)
        new = tl.where(kind == _MAX, maximum(x, y), new)
        new = tl.where(kind == _LT, tl.where(x < y, 1.0, 0.0), new)
        new = tl.where(kind == _LE, tl.where(x <= y, 1.0, 0.0), new)
        new = tl.where(kind == _EQ, tl.where(x == y, 1.0, 0.0), new)
        new = tl.where(kind == _WHERE, tl.where(x != 0, y, z), new)
        new = tl.where(kind == _SQRT, tl.sqrt(x), new)
        new = tl.where(kind == _EXP, tl.exp(x), new)
        new = tl.where(kind == _LOG, tl.log(x), new)
        new = tl.where(kind == _ABS, tl.abs(x), new)
        new = tl.where(kind == _FLOOR, tl.floor(x), new)
        value = tl.where(kind == _FLOAT32, x.to(tl.float32).to(tl.float64), new)
    tl.store(rows + row * WIDTH + goes, value.to(rows.dtype.element_ty), mask=goes >= 0)
    skip = tl.full((), 0.0, tl.float64)
    if STATS == "read":
        skip = tl.load(stats + 1)
    elif STATS == "form":
        # By every program, the same: none can wait for another.
        factor, skip, norm, faults = stats_of(
            partials, count, max_norm, grad_scale, found_inf, KIND, SCALED, FOUND, SKIP, BLOCK
        )
        if row == 0:
            store_stats(stats, factor, skip, norm, faults)
    if skip == 0:
        # Each of the parameters that share the row has a copy.
        copies = tl.load(code + 3 * SLOTS)
        for k in tl.static_range(KEPT):
            this = slot == tl.load(code + 5 * SLOTS + k)
            number = tl.sum(tl.where(this, value, 0.0), axis=0)
            address = tl.sum(tl.where(this, kept, 0), axis=0)
            is_64 = tl.sum(tl.where(this & (goes == _KEPT64), 1, 0), axis=0)
            copies_64 = tl.where(is_64 == 1, tl.where(address == 0, 0, copies), 0)
            copies_32 = tl.where(is_64 == 1, 0, tl.where(address == 0, 0, copies))
            for begin in range(0, copies, COPIES):
                copy = begin + tl.arange(0, COPIES)
                to_32 = address.to(tl.pointer_type(tl.float32)) + copy
                tl.store(to_32, tl.full((COPIES,), 0.0, tl.float32) + number.to(tl.float32), mask=copy < copies_32)
                to_64 = address.to(tl.pointer_type(tl.float64)) + copy
                tl.store(to_64, tl.full((COPIES,), 0.0, tl.float64) + number, mask=copy < copies_64)
    if RANDOM:
        low = tl.sum(tl.where(goes == _LOW, value, 0.0), axis=0).to(tl.int32)
        high = tl.sum(tl.where(goes == _HIGH, value, 0.0), axis=0).to(tl.int32)
        step = tl.sum(tl.where(goes == _STEP, value, 0.0), axis=0).to(tl.int32)
        tl.store(keys + row, row_key(low, high, step))
