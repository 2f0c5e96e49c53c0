"""Instructions by which the threads of a warp exchange values."""

from __future__ import annotations

import functools
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import larger
from .memory_operations import addresses, who
from .operands import TYPES
from .parse import Instruction, Operand

if TYPE_CHECKING:
    from .machine import Machine

Array = np.ndarray
WARP = 32


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
    """Each thread gets the sum of its warp's integers, or the largest of its float32 numbers."""
    values = by_warp(m, one.operands[1], one.modifiers[-1])
    if one.modifiers == ("sync", "add", "s32"):
        found = values.sum(1, dtype=values.dtype)
    elif one.modifiers == ("sync", "max", "f32"):
        found = functools.reduce(partial(larger, keep_nan=False), values.T)
    else:
        raise NotImplementedError(f"the machine does not know this reduction: {one.text}")
    m.write(one.operands[0], np.repeat(found, WARP))


def ballot(m: Machine, one: Instruction) -> None:
    """Each thread gets the predicates of its warp, a bit each."""
    if one.modifiers != ("sync", "ballot", "b32"):
        raise NotImplementedError(f"the machine does not know this vote: {one.text}")
    bits = by_warp(m, one.operands[1], "pred").astype(np.uint64) << np.arange(WARP, dtype=np.uint64)
    m.write(one.operands[0], np.repeat(bits.sum(1).astype(np.uint32), WARP))


def load_matrix(m: Machine, one: Instruction) -> None:
    """8 rows of 16 bytes of shared memory, at the addresses of threads 0 to 7. Of row k, threads 4 k to 4 k + 3 take 4
    bytes each.
    """
    if one.modifiers != ("sync", "aligned", "m8n8", "x1", "shared", "b16"):
        raise NotImplementedError(f"the machine does not know this matrix: {one.text}")
    there = np.broadcast_to(addresses(m, one.operands[1]), len(m.standing())).reshape(-1, WARP)
    rows, lane = there[:, :8], np.arange(WARP)
    crooked = np.repeat((rows % 16 != 0).any(1), WARP)
    if crooked.any():
        m.report("misaligned", crooked, "a row of 16 bytes of shared memory")
    own = (rows[:, lane // 4] + 4 * (lane % 4)).reshape(-1)
    values, unwritten = m.shared.load(own, 4, 1, who(m), m.report)
    if unwritten:
        m.unwritten.append(f"shared memory in {one.text}")
    out = np.zeros(m.lanes, np.uint32)
    out[m.standing()] = values[:, 0]
    m.write(one.operands[0].parts[0], out)


OPERATIONS = {"shfl": shuffle, "redux": reduce, "vote": ballot, "ldmatrix": load_matrix}
