"""Floating-point instructions, and those that share an opcode with them."""

from __future__ import annotations

from functools import partial, reduce
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import canonical, fma32, fma64, larger
from .operands import TYPES, only, sources, type_of, widened, write_float
from .parse import Instruction

if TYPE_CHECKING:
    from .machine import Machine


def add_or_subtract(m: Machine, one: Instruction) -> None:
    only(one, "rn", "ftz")
    if one.modifiers[-1] == "f32x2":
        return _pairs(m, one)
    x, y = sources(m, one)
    result = x + y if one.opcode == "add" else x - y
    return write_float(m, one, canonical(result)) if result.dtype.kind == "f" else m.write(one.operands[0], result)


def multiply(m: Machine, one: Instruction) -> None:
    if one.modifiers[-1] == "f32x2":
        return _pairs(m, one)
    if "f" in one.modifiers[-1]:
        only(one, "rn", "ftz")
        x, y = sources(m, one)
        return write_float(m, one, canonical(x * y))
    m.write(one.operands[0], _product(m, one))


def multiply_add(m: Machine, one: Instruction) -> None:
    product = _product(m, one)
    m.write(one.operands[0], product + m.read(one.operands[3], product.dtype))


def _product(m: Machine, one: Instruction) -> np.ndarray:
    """Of integers: the lower half, or in twice the width."""
    only(one, "lo", "wide")
    x, y = (m.read(operand, type_of(one)) for operand in one.operands[1:3])
    if "wide" in one.modifiers:
        wide = np.dtype(f"{x.dtype.kind}{2 * x.dtype.itemsize}")
        x, y = x.astype(wide), y.astype(wide)
    return x * y


def fused_multiply_add(m: Machine, one: Instruction) -> None:
    only(one, "rn", "ftz")
    if one.modifiers[-1] == "f32x2":
        return _pairs(m, one)
    write_float(m, one, (fma64 if one.modifiers[-1] == "f64" else fma32)(*sources(m, one)))


def _pairs(m: Machine, one: Instruction) -> None:
    """Two float32 operations at once."""
    only(one, "rn")
    values = [np.ascontiguousarray(bits).view(np.float32).reshape(-1, 2) for bits in sources(m, one)]
    of = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma32}[one.opcode]
    m.write(one.operands[0], np.ascontiguousarray(canonical(of(*values))).view(np.uint64).reshape(-1))


EXACT = {"div": np.divide, "rcp": np.reciprocal, "sqrt": np.sqrt, "ex2": np.exp2}


def function(m: Machine, one: Instruction) -> None:
    """Quotients, roots and the like: correctly rounded, or approximate."""
    only(one, "rn", "approx", "full", "ftz")
    if type_of(one).kind != "f":
        raise NotImplementedError(f"the machine divides no integers: {one.text}")
    result = EXACT[one.opcode](*(value.astype(np.float64) for value in sources(m, one)))
    if one.modifiers[-1] == "f32":
        exact = "rn" in one.modifiers
        return write_float(m, one, canonical(result.astype(np.float32)) if exact else m.approximate(one.opcode, result))
    if "approx" in one.modifiers:  # the upper half; the lower is 0
        result = (result.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
    m.write(one.operands[0], result)


def extreme(m: Machine, one: Instruction) -> None:
    """The largest or the smallest of two or three."""
    only(one, "NaN", "ftz")
    values, least = sources(m, one), one.opcode == "min"
    if type_of(one).kind != "f":
        return m.write(one.operands[0], reduce(np.minimum if least else np.maximum, values))
    result = reduce(partial(larger, keep_nan="NaN" in one.modifiers), [-x if least else x for x in values])
    write_float(m, one, canonical(-result if least else result))


def change_sign(m: Machine, one: Instruction) -> None:
    """abs and neg. Of 16-bit numbers the sign bits."""
    only(one, "ftz")
    kind = one.modifiers[-1]
    if "f16" in kind:
        x = m.read(one.operands[1], TYPES[kind])
        signs = x.dtype.type(0x80008000 if kind.endswith("x2") else 0x8000)
        return m.write(one.operands[0], x & ~signs if one.opcode == "abs" else x ^ signs)
    (x,) = sources(m, one)
    m.write(one.operands[0], np.abs(x) if one.opcode == "abs" else -x)


COMPARISONS = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater},
    **{"ge": np.greater_equal},
}


def compare(m: Machine, one: Instruction) -> None:
    """Comparisons; those that end in u, and nan, hold where an operand is NaN."""
    name, kind = one.modifiers[0], one.modifiers[-1]
    only(one, *COMPARISONS, *(f"{n}u" for n in COMPARISONS), "num", "nan")
    x, y = (m.read(operand, TYPES[kind]) for operand in one.operands[1:3])
    if "f16" in kind:
        x, y = widened(x, kind), widened(y, kind)
    unordered = np.isnan(x) | np.isnan(y) if x.dtype.kind == "f" else np.zeros(1, bool)
    if name in ("num", "nan"):
        result = unordered == (name == "nan")
    else:
        result = COMPARISONS[name[:2]](x, y) & ~unordered
        result = result | unordered if name.endswith("u") else result
    to = one.operands[0]
    if kind.endswith("x2"):
        for i, part in enumerate(to.parts):
            m.write(part, result[:, i].copy())
        return
    m.write(to, result)


OPERATIONS = {
    **dict.fromkeys(("add", "sub"), add_or_subtract),
    **{"mul": multiply, "mad": multiply_add, "fma": fused_multiply_add, "setp": compare},
    **dict.fromkeys(EXACT, function),
    **dict.fromkeys(("min", "max"), extreme),
    **dict.fromkeys(("abs", "neg"), change_sign),
}
