"""Reads SASS and amdgcn: control flow, memory accesses, and which code is which branch of a kernel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    """One machine instruction.

    Attributes:
        lines: lines of the kernel's file that it was made from: its own and those it was inlined at.
        guarded: whether a predicate may skip it.
        loaded, stored: bytes of global memory that one thread loads or stores with it.
        local: whether it moves a register to or from the stack.
    """

    opcode: str
    lines: frozenset[int]
    guarded: bool = False
    loaded: int = 0
    stored: int = 0
    local: bool = False


class Block(NamedTuple):
    """A basic block: instructions that run one after another, and the blocks (by number) that may run next."""

    instructions: list[Instruction]
    successors: list[int]


class Branch(NamedTuple):
    """The code of one inlined call: its instructions and those of them that access global memory."""

    instructions: list[Instruction]
    accesses: list[Instruction]


def branch_of_call(blocks: list[Block], line: int) -> Branch:
    """The code that runs for the call on `line` of the kernel's file, found from control flow and line information.

    The call's accesses are the loads and stores whose chain of inlining goes through `line`. Its code is every block
    that lies between two of them: that an access can reach and that can reach an access. So tests and address tables
    before the call are not part of it, nor is the other branch; the slow paths of a division that branch off and come
    back are, but not the subroutines which these call.

    Raises:
        ValueError: no access comes from that line.
    """
    seeds = {i for i, block in enumerate(blocks) if any(map(_accesses, _made_from(block.instructions, line)))}
    if not seeds:
        raise ValueError(
            f"no load or store is made from line {line} of the kernel. Its artefact may lack line information: unset "
            "TRITON_DISABLE_LINE_INFO and empty Triton's cache."
        )
    backward: list[list[int]] = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for successor in block.successors:
            backward[successor].append(i)
    between = _reached(seeds, [block.successors for block in blocks]) & _reached(seeds, backward)
    instructions = [x for i in sorted(between) for x in blocks[i].instructions]
    return Branch(instructions, [x for x in _made_from(instructions, line) if _accesses(x)])


def _accesses(instruction: Instruction) -> bool:
    return instruction.loaded + instruction.stored > 0


def _made_from(instructions: Iterable[Instruction], line: int) -> Iterator[Instruction]:
    return (x for x in instructions if line in x.lines)


def _reached(seeds: set[int], edges: list[list[int]]) -> set[int]:
    found, waiting = set(seeds), list(seeds)
    while waiting:
        for i in edges[waiting.pop()]:
            if i not in found:
                found.add(i)
                waiting.append(i)
    return found


class _Code(NamedTuple):
    """An instruction with the label that it may go to, and whether it may go on to the next one."""

    instruction: Instruction
    target: str | None
    falls_through: bool
    ends_block: bool


def _blocks(listing: Iterable[_Code | str]) -> list[Block]:
    """Basic blocks of a listing of instructions and (as strings) labels."""
    runs: list[list[_Code]] = [[]]
    labels: dict[str, int] = {}
    for item in listing:
        if isinstance(item, str):
            if runs[-1]:
                runs.append([])
            labels[item] = len(runs) - 1
            continue
        runs[-1].append(item)
        if item.ends_block:
            runs.append([])
    blocks = []
    for i, run in enumerate(runs):
        last = run[-1] if run else None
        successors = [i + 1] if (last is None or last.falls_through) and i + 1 < len(runs) else []
        if last is not None and last.target is not None:
            successors.append(labels[last.target])
        blocks.append(Block([code.instruction for code in run], successors))
    return blocks


_SASS = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_SASS_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def sass_blocks(text: str, file: str) -> list[Block]:
    """Basic blocks of what ``nvdisasm -c -gi`` prints; `file` ends the path of the kernel's file."""
    return _blocks(_sass(text, file))


def _sass(text: str, file: str) -> Iterator[_Code | str]:
    lines: frozenset[int] = frozenset()
    noted = False
    for row in text.splitlines():
        if row.lstrip().startswith("//##"):
            # One note may span rows; the instructions up to the next note share it.
            own = {int(line) for path, line in re.findall(r'"([^"]+)", line (\d+)', row) if path.endswith(file)}
            lines = lines | own if noted else frozenset(own)
            noted = True
            continue
        if match := _SASS.match(row):
            noted = False
            guard, opcode, operands = match.groups()
            yield _sass_code(opcode, operands.strip(), guard is not None, lines)
        elif label := re.match(r"(\.L_\w+):", row):
            yield label[1]


def _sass_code(opcode: str, operands: str, guarded: bool, lines: frozenset[int]) -> _Code:
    name, *modifiers = opcode.split(".")
    size = next((_SASS_BYTES[m] for m in modifiers if m in _SASS_BYTES), 4)
    instruction = Instruction(
        opcode,
        lines,
        guarded,
        loaded=size if name in ("LDG", "LD") else 0,
        stored=size if name in ("STG", "ST") else 0,
        local=name in ("LDL", "STL"),
    )
    if name in ("BRX", "JMP", "JMX", "JMXU", "BRXU"):
        raise ValueError(f"{opcode} {operands} goes to a computed address, which the audit cannot follow")
    ends = name in ("BRA", "EXIT", "RET")
    target = re.search(r"\((\.L_\w+)\)", operands) if name == "BRA" else None
    # A branch may carry its condition before it or, as its first operand, after it.
    conditional = guarded or (target is not None and not operands.startswith("`"))
    return _Code(instruction, target[1] if target else None, not ends or conditional, ends)


# Older targets say ushort and dwordx4, newer ones u16 and b128.
_AMDGCN_ACCESS = re.compile(r"(buffer|global|flat|scratch)_(load|store)_(\w+)")
_AMDGCN_SIZE = re.compile(r"(?:[us]?(byte|short)|(dword)(?:x(\d))?|(?:d16_)?(?:hi_)?[bui](\d+))(?:_|$)")


def amdgcn_blocks(text: str, file: str) -> list[Block]:
    """Basic blocks of amdgcn assembly; `file` is the name of the kernel's file."""
    return _blocks(_amdgcn(text, file))


def _amdgcn(text: str, file: str) -> Iterator[_Code | str]:
    lines: frozenset[int] = frozenset()
    for row in text.split(".Lfunc_end", 1)[0].splitlines():
        code, _, comment = row.partition(";")
        if code.startswith("\t.loc"):
            lines = frozenset(int(line) for line in re.findall(rf"\b{re.escape(file)}:(\d+)", comment))
        elif label := re.match(r"(\.?\w+):", code):
            yield label[1]
        elif match := re.match(r"\t([a-z]\w*)\s*(.*)", code):
            yield _amdgcn_code(match[1], match[2].strip(), lines)


def _amdgcn_code(opcode: str, operands: str, lines: frozenset[int]) -> _Code:
    loaded = stored = 0
    local = False
    if match := _AMDGCN_ACCESS.match(opcode):
        space, direction, what = match.groups()
        size = _AMDGCN_SIZE.match(what)
        if size is None:
            raise ValueError(f"{opcode} is an access whose width the audit does not know: add it to its table")
        words = {"byte": 1, "short": 2, None: 4 * int(size[3] or 1)}
        moved = int(size[4]) // 8 if size[4] else words[size[1]]
        local = space == "scratch"
        loaded, stored = (0, 0) if local else (moved, 0) if direction == "load" else (0, moved)
    if opcode in ("s_setpc_b64", "s_swappc_b64"):
        raise ValueError(f"{opcode} {operands} goes to a computed address, which the audit cannot follow")
    jumps = opcode == "s_branch" or opcode.startswith("s_cbranch")
    ends = jumps or opcode == "s_endpgm"
    instruction = Instruction(opcode, lines, loaded=loaded, stored=stored, local=local)
    return _Code(instruction, operands if jumps else None, opcode.startswith("s_cbranch") or not ends, ends)
