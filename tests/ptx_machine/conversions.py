"""Conversions between integers and floating-point numbers of all sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import canonical, flush, to_bfloat16, to_float16
from .operands import TYPES, only, widened
from .parse import Instruction

if TYPE_CHECKING:
    from .machine import Machine

Array = np.ndarray
TO_WHOLE = {"rzi": np.trunc, "rmi": np.floor}


def convert(m: Machine, one: Instruction) -> None:
    only(one, "rn", "ftz", *TO_WHOLE)
    *how, to, source = one.modifiers
    if to in ("bf16x2", "f16x2"):
        narrow = to_bfloat16 if to == "bf16x2" else to_float16
        high, low = (narrow(m.read(operand, TYPES[source])).astype(np.uint32) for operand in one.operands[1:3])
        return m.write(one.operands[0], (high << 16) | low)
    x = m.read(one.operands[1], TYPES[source])
    if source in ("f16", "bf16"):
        x = widened(x, source)
    if "ftz" in how:
        x = flush(x)
    for name in TO_WHOLE.keys() & set(how):
        x = TO_WHOLE[name](x)
    m.write(one.operands[0], _converted(x, to, one))


def _converted(x: Array, to: str, one: Instruction) -> Array:
    if to == "f16":
        return to_float16(x)
    if to == "bf16":
        if x.dtype == np.float64:
            raise NotImplementedError(f"through float32 it would be rounded twice: {one.text}")
        return to_bfloat16(x.astype(np.float32))
    dtype = TYPES[to]
    if dtype.kind == "f":
        return canonical(x.astype(dtype))
    if x.dtype.kind == "f":
        return _saturated(x, dtype)
    # The lower bits; a wider result takes the sign of the source.
    return x.astype(np.dtype(f"{x.dtype.kind}{dtype.itemsize}")).view(dtype)


def _saturated(x: Array, dtype: np.dtype) -> Array:
    """Whole numbers as integers: 0 for NaN, and the nearest that there is for those out of range."""
    limits = np.iinfo(dtype)
    low, high = x <= np.float64(limits.min), x >= np.float64(limits.max)
    inside = np.where(low | high | np.isnan(x), 0, x).astype(dtype)
    return np.where(low, dtype.type(limits.min), np.where(high, dtype.type(limits.max), inside))


OPERATIONS = {"cvt": convert}
