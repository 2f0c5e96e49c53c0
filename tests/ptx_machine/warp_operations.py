"""Instructions by which the threads of a warp exchange values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .operands import TYPES
from .parse import Instruction, Operand

if TYPE_CHECKING:
    from .machine import Machine

Array = np.ndarray
WARP = 32
REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}


def by_warp(m: Machine, operand: Operand, dtype: str) -> Array:
    """``(warps, 32)``. A fault where some threads of a warp do not execute this."""
    if m.active is not None:
        there = m.active.reshape(-1, WARP)
        if (there.any(1) != there.all(1)).any():
            m.fault("shuffle", int(m.active.sum()), "some threads of the warp are elsewhere")
    return np.broadcast_to(m.read(operand, TYPES[dtype]), (m.lanes,)).reshape(-1, WARP)


def shuffle(m: Machine, one: Instruction) -> None:
    """Each thread takes the value of another of its warp.

    Raises:
        NotImplementedError: of a part of a warp, or in a form that Triton does not write.
    """
    to, source, which, clamp, members = one.operands
    how = one.modifiers[1]
    if how not in ("bfly", "idx") or clamp.value != WARP - 1 or members.value != -1:
        raise NotImplementedError(f"the machine does not know this shuffle: {one.text}")
    values, number = by_warp(m, source, "b32"), by_warp(m, which, "b32")
    lane = np.arange(WARP) ^ number if how == "bfly" else number
    m.write(to, np.take_along_axis(values, (lane & (WARP - 1)).astype(np.int64), 1).reshape(-1))


def reduce(m: Machine, one: Instruction) -> None:
    """Each thread gets the sum, or the like, of its warp's integers."""
    _, name, kind = one.modifiers
    if name not in REDUCTIONS or kind[0] == "f":
        raise NotImplementedError(f"the machine does not know this reduction: {one.text}")
    values = by_warp(m, one.operands[1], kind)
    m.write(one.operands[0], np.repeat(REDUCTIONS[name].reduce(values, axis=1, dtype=values.dtype), WARP))


OPERATIONS = {"shfl": shuffle, "redux": reduce}
