"""Instructions on bits: logic, shifts, fields, bytes, moves and choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .operands import only, sources, type_of
from .parse import Instruction

if TYPE_CHECKING:
    from .machine import Machine

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not}


def logic(m: Machine, one: Instruction) -> None:
    only(one)
    m.write(one.operands[0], LOGIC[one.opcode](*sources(m, one)))


def shift(m: Machine, one: Instruction) -> None:
    """By any number of bits: beyond the width there are zeros, or the sign."""
    only(one)
    kind = type_of(one)
    width = 8 * kind.itemsize
    x, by = m.read(one.operands[1], kind), m.read(one.operands[2], np.dtype("u4"))
    beyond = by >= width
    by = np.minimum(by, width - 1).astype(kind)
    shifted = x << by if one.opcode == "shl" else x >> by
    m.write(one.operands[0], shifted if kind.kind == "i" else np.where(beyond, kind.type(0), shifted))


def extract(m: Machine, one: Instruction) -> None:
    """A field of bits; a signed one is extended by its highest.

    Raises:
        NotImplementedError: a field that is empty or reaches beyond the word.
    """
    only(one)
    kind = type_of(one)
    x = m.read(one.operands[1], kind)
    start, length = (m.read(operand, np.dtype("u4")) & 0xFF for operand in one.operands[2:4])
    if (start + length > 8 * kind.itemsize).any() or (length == 0).any():
        raise NotImplementedError(f"the machine does not know such a field: {one.text}")
    left = (8 * kind.itemsize - start - length).astype(kind)
    m.write(one.operands[0], (x << left) >> (left + start.astype(kind)))


def count_ones(m: Machine, one: Instruction) -> None:
    only(one)
    m.write(one.operands[0], np.bitwise_count(m.read(one.operands[1], type_of(one))).astype(np.uint32))


def permute_bytes(m: Machine, one: Instruction) -> None:
    """Four of eight bytes; where the highest bit of the selector is set, the byte's sign in its place."""
    if one.modifiers != ("b32",):
        raise NotImplementedError(f"the machine does not know this form: {one.text}")
    low, high, selectors = (m.read(operand, np.dtype("u4")).astype(np.uint64) for operand in one.operands[1:4])
    both, out = low | (high << 32), np.zeros(1, np.uint64)
    for i in range(4):
        selector = selectors >> np.uint64(4 * i)
        byte = (both >> (8 * (selector & 7))) & 0xFF
        byte = np.where(selector & 8, np.where(byte & 0x80, np.uint64(0xFF), np.uint64(0)), byte)
        out = out | (byte << np.uint64(8 * i))
    m.write(one.operands[0], out.astype(np.uint32))


def move(m: Machine, one: Instruction) -> None:
    """Also between a register and several that are its parts, the lowest first."""
    to, source = one.operands
    size = type_of(one).itemsize
    whole = np.dtype(f"u{size}")
    if to.kind == "list":
        part = np.dtype(f"u{size // len(to.parts)}")
        values = np.ascontiguousarray(m.read(source, whole)).view(part).reshape(-1, len(to.parts))
        for i, register in enumerate(to.parts):
            m.write(register, values[:, i].copy())
    elif source.kind == "list":
        part = np.dtype(f"u{size // len(source.parts)}")
        values = np.broadcast_arrays(*(m.read(register, part) for register in source.parts))
        m.write(to, np.ascontiguousarray(np.stack(values, 1)).view(whole).reshape(-1))
    else:
        m.write(to, m.read(source, type_of(one)))


def select(m: Machine, one: Instruction) -> None:
    only(one)
    x, y = (m.read(operand, type_of(one)) for operand in one.operands[1:3])
    m.write(one.operands[0], np.where(m.bits(one.operands[3]), x, y))


OPERATIONS = {
    **dict.fromkeys(LOGIC, logic),
    **dict.fromkeys(("shl", "shr"), shift),
    **{"bfe": extract, "popc": count_ones, "prmt": permute_bytes, "mov": move, "selp": select},
}
