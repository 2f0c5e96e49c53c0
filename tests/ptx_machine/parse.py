"""PTX, as Triton's compiler writes it, as basic blocks of instructions: one kernel, no calls."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

REGISTER_BYTES = {"pred": 0, "b16": 2, "b32": 4, "b64": 8}


class Operand(NamedTuple):
    """A register, a constant, an address, or several operands in braces or divided by a bar.

    Attributes:
        kind: "register", "special", "integer", "float32", "float64", "address", "list", "pair", "symbol" or "sink".
        value: of a constant, its bits; of an address, the offset.
    """

    kind: str
    name: str = ""
    value: int = 0
    parts: tuple[Operand, ...] = ()


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        guard: the predicate under which it is executed, or nothing; `negated`: executed where that is false.
        line: of the Python source, as far as known.
    """

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str
    negated: bool
    line: str
    text: str

    @property
    def waits(self) -> int:
        """1 where the threads of a warp wait here for each other, 2 where those of a program do, else 0."""
        if self.opcode == "bar":
            return 2
        return int(self.opcode in ("shfl", "redux", "vote", "ldmatrix"))


class Kernel(NamedTuple):
    """A parsed kernel.

    Attributes:
        parameters: names, in order.
        registers: bytes of each; 0 for a predicate.
        blocks: each is entered at its first instruction alone, and left after its last.
        labels: the block that each stands for.
        threads: of a program.
    """

    name: str
    parameters: tuple[str, ...]
    registers: dict[str, int]
    blocks: list[list[Instruction]]
    labels: dict[str, int]
    threads: int


_OPERANDS = re.compile(r",(?![^{\[]*[}\]])")  # commas outside of braces and brackets
_GUARD = re.compile(r"@(!?)(%\w+)\s+(.*)", re.DOTALL)
_LINE = re.compile(r"\.loc\s.*?//\s*(\S+)")
_SPECIAL = re.compile(r"%(tid|ctaid)\.x")
_ADDRESS = re.compile(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\d+))?\s*\]")


def operand(text: str) -> Operand:
    """Parse one operand.

    Raises:
        ValueError: it is an address in a form that is not known.
    """
    text = text.strip()
    if text.startswith("{"):
        return Operand("list", parts=tuple(map(operand, text[1:-1].split(","))))
    if text.startswith("["):
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise ValueError(f"the address {text} is in an unknown form. Teach ptx_machine/parse.py to read it.")
        return Operand("address", match[1], int(match[2] or 0))
    if "|" in text:
        return Operand("pair", parts=tuple(map(operand, text.split("|"))))
    if text == "_":
        return Operand("sink")
    if _SPECIAL.fullmatch(text):
        return Operand("special", text)
    if text.startswith("%"):
        return Operand("register", text)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Operand("float32", value=int(text[2:], 16))
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Operand("float64", value=int(text[2:], 16))
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return Operand("integer", value=int(text.rstrip("U"), 0))
    return Operand("symbol", text)


def instruction(text: str, line: str) -> Instruction:
    """Parse one instruction, without its semicolon."""
    guard, negated, rest = "", False, text
    if match := _GUARD.fullmatch(text):
        negated, guard, rest = match[1] == "!", match[2], match[3]
    head, *tail = rest.split(None, 1)
    # Triton 3.8 says it in full: the shared memory of the program's own group.
    opcode, *modifiers = head.replace("shared::cta", "shared").split(".")
    operands = tuple(map(operand, _OPERANDS.split(tail[0]))) if tail else ()
    return Instruction(opcode, tuple(modifiers), operands, guard, negated, line, text)


class _Body:
    """The registers and blocks of a kernel's body, line by line."""

    def __init__(self, body: str) -> None:
        self.registers: dict[str, int] = {}
        self.blocks: list[list[Instruction]] = [[]]
        self.labels: dict[str, int] = {}
        self._targets = set(re.findall(r"\bbra(?:\.uni)?\s+(\$?\w+)", body))
        self._local: dict[str, str] = {}  # registers that inline assembly declares, by their names there
        line = pending = ""
        for row in body.split("\n"):
            if match := _LINE.search(row):
                line = match[1]
            row = row.split("//")[0].strip()
            if not row or row.startswith((".loc", ".pragma")) or self._declares(row):
                continue
            pending = f"{pending} {row}".strip()
            while ";" in pending:
                statement, pending = (part.strip() for part in pending.split(";", 1))
                # Inline assembly may stand in braces of its own.
                statement = re.sub(r"^[{}\s]+(?=[@a-z.])", "", statement)
                if statement:
                    self._add(statement, line)
            if pending in ("{", "}"):
                pending = ""

    def _declares(self, row: str) -> bool:
        """Whether a line is a label or declares numbered registers."""
        if match := re.fullmatch(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;", row):
            self.registers |= {f"%{match[2]}{i}": REGISTER_BYTES[match[1]] for i in range(int(match[3]))}
        elif (match := re.fullmatch(r"(\$?\w+):", row)) and match[1] in self._targets:
            self.blocks.append([])
            self.labels[match[1]] = len(self.blocks) - 1
        return match is not None

    def _add(self, statement: str, line: str) -> None:
        if match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement):
            for name in map(str.strip, match[2].split(",")):
                self._local[name] = f"%{name.lstrip('%')}_{len(self.registers)}"
                self.registers[self._local[name]] = REGISTER_BYTES[match[1]]
            return
        for name, own in self._local.items():
            statement = re.sub(rf"(?<![\w%.$]){re.escape(name)}(?!\w)", own, statement)
        one = instruction(statement, line)
        if one.waits and self.blocks[-1]:
            self.blocks.append([])
        self.blocks[-1].append(one)
        if one.opcode in ("bra", "ret"):
            self.blocks.append([])


@cache
def parse(ptx: str) -> Kernel:
    """Parse PTX.

    Raises:
        ValueError: there is no kernel in it, or more than one.
    """
    entries = re.findall(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\n\{(.*?)\n\}", ptx, re.DOTALL)
    if len(entries) != 1:
        raise ValueError(f"the PTX has {len(entries)} kernels, not 1. Give that of one Triton kernel.")
    ((name, declared, head, body),) = entries
    parameters = tuple(re.findall(r"\.param .*?(\w+),?\s*$", declared, re.MULTILINE))
    threads = re.search(r"\.(?:req|max)ntid (\d+)", head)
    if threads is None:
        raise ValueError(f"{name} does not say how many threads a program has. Triton's kernels do: .reqntid.")
    found = _Body(body)
    return Kernel(name, parameters, found.registers, found.blocks, found.labels, int(threads[1]))
