"""What the functions of all instructions share: PTX's types, and reading operands of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import flush, from_bfloat16, from_float16
from .parse import Instruction

if TYPE_CHECKING:
    from .machine import Machine

Array = np.ndarray
Operation = Callable[["Machine", Instruction], None]

TYPES = {
    **{f"{kind}{8 * n}": np.dtype(f"{kind.replace('s', 'i')}{n}") for kind in "us" for n in (1, 2, 4, 8)},
    **{f"b{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "pred": np.dtype("?"),
    # Two bytes, or a pair of them, as bits: NumPy has no bfloat16.
    "f16": np.dtype("u2"),
    "bf16": np.dtype("u2"),
    "f16x2": np.dtype("u4"),
    "bf16x2": np.dtype("u4"),
    "f32x2": np.dtype("u8"),
}


def type_of(one: Instruction) -> np.dtype:
    """The type an instruction works on, its last modifier."""
    return TYPES[one.modifiers[-1]]


def sources(m: Machine, one: Instruction) -> list[Array]:
    """All operands but the first, which is the result, as the instruction's type; subnormals flushed if it says so. Of
    two types the last is that of all but the last operand.

    Raises:
        NotImplementedError: it computes in 16 bits.
    """
    given, kind = one.operands[1:], one.modifiers[-1]
    if "f16" in kind:
        if one.modifiers[-2:-1] != ("f32",):
            raise NotImplementedError(f"the machine computes nothing in 16 bits: {one.text}")
        narrow = [widened(m.read(operand, TYPES[kind]), kind) for operand in given[:-1]]
        values = [*narrow, m.read(given[-1], TYPES["f32"])]
    else:
        values = [m.read(operand, TYPES[kind]) for operand in given]
    return [flush(x) if x.dtype.kind == "f" else x for x in values] if "ftz" in one.modifiers else values


def write_float(m: Machine, one: Instruction, value: Array) -> None:
    """The result of a floating-point instruction, flushed if it says so."""
    m.write(one.operands[0], flush(value) if "ftz" in one.modifiers and value.dtype == np.float32 else value)


def widened(bits: Array, kind: str) -> Array:
    """16-bit numbers as float32; of pairs ``(threads, 2)``, the lower one first."""
    if kind.endswith("x2"):
        bits = np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2)
    return from_bfloat16(bits) if kind.startswith("bf16") else from_float16(bits)


def only(one: Instruction, *known: str) -> None:
    """Refuse modifiers that are not among these: what they change would go unnoticed.

    Raises:
        NotImplementedError: there are others.
    """
    if unknown := set(one.modifiers) - set(known) - set(TYPES):
        raise NotImplementedError(f"the machine does not know {sorted(unknown)} of {one.text}")
