"""Loads, stores and barriers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .operands import TYPES, only, type_of
from .parse import Instruction, Operand

if TYPE_CHECKING:
    from .machine import Machine

Array = np.ndarray
WARP = 32
VECTORS = ("v2", "v4")


def addresses(m: Machine, operand: Operand) -> Array:
    """Where each thread that executes this points."""
    base = m.register(operand.name) if operand.name.startswith("%") else np.zeros(1, np.int64)  # shared memory
    return np.broadcast_to(base, (m.lanes,))[m.standing()].astype(np.int64) + operand.value


def who(m: Machine) -> Array:
    """Of each thread that executes this its program, its warp, and how many barriers that program has passed."""
    lanes = m.standing()
    return np.stack((m.program[lanes], m.warp[lanes], m.barriers[m.program[lanes]]))


def globally(m: Machine) -> Array:
    """The same, counted over all programs of the launch."""
    return who(m) + m.first_program * np.array([[1], [m.kernel.threads // WARP], [0]])


def load(m: Machine, one: Instruction) -> None:
    only(one, "global", "shared", "param", *VECTORS)
    kind, space = type_of(one), one.modifiers[0]
    to, source = one.operands
    if space == "param":
        bits = m.arguments[source.name] & ((1 << 8 * kind.itemsize) - 1)
        return m.write(to, np.array([bits], np.uint64).astype(f"u{kind.itemsize}").view(kind))
    registers = to.parts if to.kind == "list" else (to,)
    at, size = addresses(m, source), kind.itemsize
    if space == "global":
        values = m.memory.load(at, size, len(registers), globally(m), m.report)
    else:
        values, unwritten = m.shared.load(at, size, len(registers), who(m), m.report)
        if unwritten:
            m.unwritten.append(f"shared memory in {one.text}")
    for i, register in enumerate(registers):
        value = np.zeros(m.lanes, values.dtype)
        value[m.standing()] = values[:, i]
        m.write(register, value.view(kind))


def store(m: Machine, one: Instruction) -> None:
    only(one, "global", "shared", *VECTORS)
    to, source = one.operands
    registers = source.parts if source.kind == "list" else (source,)
    unsigned = TYPES[f"b{8 * type_of(one).itemsize}"]
    values = np.stack([np.broadcast_to(m.read(x, unsigned), (m.lanes,))[m.standing()] for x in registers], 1)
    if one.modifiers[0] == "global":
        m.memory.store(addresses(m, to), values, globally(m), m.report)
    else:
        m.shared.store(addresses(m, to), values, who(m), m.report)


def barrier(m: Machine, one: Instruction) -> None:
    """The threads of a program wait for each other."""
    only(one, "sync")
    if m.active is None:
        m.barriers += 1
        return
    there = m.active.reshape(-1, m.kernel.threads)
    if (there.any(1) != there.all(1)).any():
        m.fault("barrier", int(m.active.sum()), "some threads of the program are elsewhere")
    m.barriers[there.any(1)] += 1


OPERATIONS = {"ld": load, "st": store, "bar": barrier}
