"""Runs a parsed kernel: the threads of many programs in lock-step, a NumPy array for each register.

Each thread has its own place in the code. The earliest block in which a thread stands runs next; threads that stand
elsewhere are masked. A block begins where threads wait for each other, and those that have come wait until all have. A
register's array has an item for each thread, or one item where all threads hold the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import conversions, float_operations, integer_operations, memory_operations, warp_operations
from .arithmetic import Approximate
from .global_memory import GlobalMemory
from .parse import Instruction, Kernel, Operand
from .shared_memory import SharedMemory

Array = np.ndarray
WARP = 32
TOGETHER = 1 << 16  # threads that run in step, at most
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_DONE = 1 << 30

OPERATIONS = {
    **float_operations.OPERATIONS,
    **integer_operations.OPERATIONS,
    **conversions.OPERATIONS,
    **memory_operations.OPERATIONS,
    **warp_operations.OPERATIONS,
}


class Fault(NamedTuple):
    """What a GPU would fault on, or what is undefined there.

    Attributes:
        kind: "out of bounds", "misaligned", "race", "barrier", "shuffle" or "uninitialised".
        instruction, line: where in the PTX, and where in the Python source.
        threads: how many.
    """

    kind: str
    instruction: str
    line: str
    threads: int
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail} ({self.threads} threads, {self.line}: {self.instruction})"


class Machine:
    """One launch.

    Args:
        programs: of the grid, which has one dimension.
        arguments: the bits of each parameter.
        shared: bytes of shared memory a program.
        approximate: gives the results of approximate instructions.
        poison: what each byte holds of registers and shared memory that nothing was written to.
    """

    def __init__(
        self,
        kernel: Kernel,
        programs: int,
        arguments: list[int],
        memory: GlobalMemory,
        shared: int = 0,
        approximate: Approximate | None = None,
        poison: int = 0xA5,
    ) -> None:
        if len(arguments) != len(kernel.parameters):
            raise ValueError(f"{kernel.name} takes {len(kernel.parameters)} arguments; got {len(arguments)}.")
        self.kernel, self.programs, self.memory = kernel, programs, memory
        self.arguments = dict(zip(kernel.parameters, arguments, strict=True))
        self.approximate = approximate or Approximate()
        self.faults: list[Fault] = []
        self.unwritten: list[str] = []  # what was read before it was written, with the instruction
        self._shared_bytes, self._poison = shared, poison

    def run(self) -> list[Fault]:
        """Run all programs, and return what is wrong."""
        together = max(1, TOGETHER // self.kernel.threads)
        for first in range(0, self.programs, together):
            self._run(first, min(together, self.programs - first))
        count, example = self.memory.races()
        if count:
            self.faults.append(Fault("race", "global memory", self.kernel.name, count, example))
        return self.faults

    def _run(self, first: int, programs: int) -> None:
        threads = self.kernel.threads
        self.lanes = programs * threads
        lane = np.arange(self.lanes)
        self.lane, self.program, self.warp = lane, lane // threads, lane // WARP
        self.first_program = first
        self.special = {
            "%tid.x": (lane % threads).astype(np.uint32),
            "%ctaid.x": (first + self.program).astype(np.uint32),
        }
        self.registers: dict[str, Array] = {}
        self._defined: dict[str, Array] = {}  # where only some threads wrote to a register
        self.shared = SharedMemory(programs, self._shared_bytes, self._poison)
        self.barriers = np.zeros(programs, np.int64)  # that each program has passed
        place = np.zeros(self.lanes, np.int64)
        with np.errstate(all="ignore"):
            while (block := int(place.min())) < _DONE:
                here = place == block
                block, self.mask = (block, None) if here.all() else self._next(place, block, here)
                self._run_block(block, place)

    def _next(self, place: Array, first: int, here: Array) -> tuple[int, Array]:
        """The block that runs next, and the threads that run it."""
        for block in np.unique(place[place < _DONE]).tolist():
            standing = place == block
            body = self.kernel.blocks[block]
            if wait := body[0].waits if body else 0:
                groups = standing.reshape(-1, WARP if wait == 1 else self.kernel.threads)
                standing = np.repeat(groups.all(1), groups.shape[1])
            if standing.any():
                return block, standing
        return first, here  # these wait for ever, and the instruction reports it

    def _run_block(self, number: int, place: Array) -> None:
        after = number + 1 if number + 1 < len(self.kernel.blocks) else _DONE
        standing = slice(None) if self.mask is None else self.mask
        for one in self.kernel.blocks[number]:
            self.now = one
            self.active = self._active(one)
            if one.opcode in ("bra", "ret"):
                place[standing] = after
                going = slice(None) if self.active is None else self.active
                place[going] = _DONE if one.opcode == "ret" else self.kernel.labels[one.operands[0].name]
                return
            if one.opcode not in OPERATIONS:
                raise NotImplementedError(f"the machine does not know {one.text}")
            OPERATIONS[one.opcode](self, one)
        place[standing] = after

    def _active(self, one: Instruction) -> Array | None:
        """The threads that execute an instruction; None for all."""
        if not one.guard:
            return self.mask
        guard = self.register(one.guard)
        guard = ~guard if one.negated else guard
        if self.mask is None and guard.all():
            return None
        return np.broadcast_to(guard if self.mask is None else self.mask & guard, (self.lanes,))

    def standing(self) -> Array:
        """The indices of the threads that execute this instruction."""
        return self.lane if self.active is None else self.lane[self.active]

    # Operands.

    def register(self, name: str) -> Array:
        """What a register holds, unsigned; of a predicate, bool."""
        value = self.registers.get(name)
        if value is None:
            value = self._blank(name)
            self.unwritten.append(f"{name} in {self.now.text}")
        elif name in self._defined:
            missing = ~self._defined[name]
            if (missing if self.mask is None else missing & self.mask).any():
                self.unwritten.append(f"{name} in {self.now.text}")
        return value

    def _blank(self, name: str) -> Array:
        size = self.kernel.registers[name]
        blank = np.full(max(size, 1), self._poison, np.uint8)
        return blank.view(_UNSIGNED[size]) if size else (blank & 1).astype(bool)

    def bits(self, operand: Operand) -> Array:
        """What an operand holds, unsigned; of a predicate, bool."""
        if operand.kind == "register":
            return self.register(operand.name)
        if operand.kind == "special":
            return self.special[operand.name]
        if operand.kind == "float32":
            return np.array([operand.value], np.uint32)
        if operand.kind in ("integer", "float64"):
            return np.array([operand.value & 0xFFFFFFFFFFFFFFFF], np.uint64)
        if operand.kind == "symbol":  # shared memory, which begins at 0
            return np.zeros(1, np.uint64)
        raise NotImplementedError(f"the machine cannot read a {operand.kind}: {self.now.text}")

    def read(self, operand: Operand, dtype: np.dtype) -> Array:
        """What an operand holds, as this dtype: its lower bits; of a predicate, bool."""
        bits = self.bits(operand)
        if bits.dtype == np.bool_:
            return bits
        if bits.dtype.itemsize != dtype.itemsize:
            bits = bits.astype(_UNSIGNED[dtype.itemsize])
        return bits.view(dtype)

    def write(self, operand: Operand, value: Array) -> None:
        """Bring a value to a register, of the threads that execute this. A narrower integer is extended by its sign."""
        if operand.kind == "sink":
            return
        name = operand.name
        size = self.kernel.registers[name]
        if size == 0:
            value = value.astype(np.bool_)
        else:
            if value.dtype.itemsize != size:
                value = value.astype(np.dtype(f"{value.dtype.kind}{size}"))
            value = value.view(_UNSIGNED[size])
        if self.active is None:
            self.registers[name] = value
            self._defined.pop(name, None)
            return
        old = self.registers.get(name)
        if old is None:
            old = self._blank(name)
            self._defined[name] = self.active
        elif name in self._defined:
            self._defined[name] = self._defined[name] | self.active
        self.registers[name] = np.where(self.active, value, old)

    # Faults.

    def fault(self, kind: str, threads: int, detail: str) -> None:
        """Keep a fault of this instruction, once."""
        found = Fault(kind, self.now.text, self.now.line, threads, detail)
        if all((f.kind, f.instruction, f.line) != (kind, found.instruction, found.line) for f in self.faults):
            self.faults.append(found)

    def report(self, kind: str, wrong: Array, detail: str) -> None:
        """Keep a fault of some of the threads that execute this instruction."""
        first = int(self.standing()[wrong][0])
        program, thread = self.first_program + first // self.kernel.threads, first % self.kernel.threads
        self.fault(kind, int(wrong.sum()), f"{detail}, in program {program}, thread {thread}")
