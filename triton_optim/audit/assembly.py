"""Reads SASS and amdgcn: control flow, memory accesses, and which code is which branch of a kernel."""

from __future__ import annotations

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """One machine instruction.

    Attributes:
        guarded: whether a predicate may skip it.
        loaded, stored: bytes of global memory that one thread loads or stores with it.
        local: whether it moves a register to or from the stack.
    """

    opcode: str
    guarded: bool = False
    loaded: int = 0
    stored: int = 0
    local: bool = False

    @property
    def moved(self) -> int:
        """Bytes of global memory that one thread moves with it."""
        return self.loaded + self.stored


class Block(NamedTuple):
    """A basic block: instructions that run one after another, and the blocks (by number) that may run next."""

    instructions: list[Instruction]
    successors: list[int]


class Branch(NamedTuple):
    """The code of one branch: its instructions, and those of them that access global memory."""

    instructions: list[Instruction]
    accesses: list[Instruction]


def full_chunk_branch(blocks: list[Block]) -> Branch:
    """The code that takes a full chunk, without masks, found from the control flow alone.

    The kernel decides by one test whether a chunk is full, and either side reads the chunk. So the block with the test
    is the first one, from the entry on, of which two of the blocks that it is the immediate dominator of lead on to
    reads: the sides of the test. Each side is its blocks from the first access of global memory to the last: those
    that lie between two accesses. What comes before the test, the reading of tables, belongs to neither, nor do
    subroutines such as the slow path of a division.

    Both sides do the same work and one also computes masks: the full chunk's is the one of fewer instructions. Were
    the masked one taken for it, its guarded and narrow accesses would fail the audit, not pass it.

    Raises:
        ValueError: there is no such test.
    """
    edges = [block.successors for block in blocks]
    reachable = _reached({0}, edges)
    # What a block dominates besides itself: no way leads there that avoids it.
    below = [reachable - _reached({0}, edges, avoided=i) - {i} for i in range(len(blocks))]
    reading = {i for i in reachable if any(x.loaded for x in blocks[i].instructions)}

    def sides_of(test: int) -> list[set[int]]:
        own = below[test]
        branches = [below[i] | {i} for i in sorted(own) if not any(i in below[j] for j in own)]
        return [side for side in branches if reading & side]

    sides = [{0} | below[0]]
    while len(sides) == 1:
        (test,) = (i for i in sides[0] if sides[0] - {i} == below[i])
        sides = sides_of(test)
    if len(sides) != 2:
        raise ValueError(f"the kernel reads chunks on {len(sides)} sides of a test, and the audit can read 2 of them")
    return min((_from_first_access_to_last(blocks, side) for side in sides), key=lambda side: len(side.instructions))


def _from_first_access_to_last(blocks: list[Block], side: set[int]) -> Branch:
    forward = [[j for j in block.successors if j in side] for block in blocks]
    backward: list[list[int]] = [[] for _ in blocks]
    for i in side:
        for j in forward[i]:
            backward[j].append(i)
    ends = {i for i in side if any(x.moved for x in blocks[i].instructions)}
    between = _reached(ends, forward) & _reached(ends, backward)
    instructions = [x for i in sorted(between) for x in blocks[i].instructions]
    return Branch(instructions, [x for x in instructions if x.moved])


def _reached(starts: set[int], edges: list[list[int]], avoided: int | None = None) -> set[int]:
    found = starts - {avoided}
    waiting = list(found)
    while waiting:
        new = set(edges[waiting.pop()]) - found - {avoided}
        found |= new
        waiting += new
    return found


class _Code(NamedTuple):
    """An instruction with what it says of the flow: its guard, the label it may go to, whether it may go on instead."""

    instruction: Instruction
    operands: str
    guard: str | None
    target: str | None
    falls_through: bool
    ends_block: bool


def _blocks(listing: list[_Code | str]) -> list[Block]:
    """Basic blocks of a listing of instructions and (as strings) labels."""
    runs, labels = _runs(listing)
    blocks = []
    for i, run in enumerate(runs):
        last = run[-1] if run else None
        successors = [i + 1] if (last is None or last.falls_through) and i + 1 < len(runs) else []
        if last is not None and last.target is not None:
            successors.append(labels[last.target])
        blocks.append(Block([code.instruction for code in run], successors))
    for i, run in enumerate(runs):
        before, side = _predicated_side(run)
        if side:
            taken = side[-1].target
            blocks[i] = Block([code.instruction for code in before], [i + 1, len(blocks)])
            unguarded = [code.instruction._replace(guarded=False) for code in side]
            blocks.append(Block(unguarded, [] if taken is None else [labels[taken]]))
    return blocks


def _predicated_side(run: list[_Code]) -> tuple[list[_Code], list[_Code]]:
    """What is before, and what is on, a side of a test that was merged with the code before the test's branch.

    A short side may be merged: each of its instructions has the guard of the branch that ends it. They follow the
    last instruction that could set their predicate.
    """
    guard = run[-1].guard if run and run[-1].ends_block else None
    if guard is None:
        return run, []
    predicate = re.compile(rf"\b{guard.lstrip('!')}\b")
    sets = [k for k, code in enumerate(run[:-1]) if code.guard != guard and predicate.search(code.operands)]
    first = sets[-1] + 1 if sets else 0
    side = [code for code in run[first:] if code.guard == guard]
    if not any(code.instruction.moved for code in side):
        return run, []
    return run[:first] + [code for code in run[first:] if code.guard != guard], side


def _runs(listing: list[_Code | str]) -> tuple[list[list[_Code]], dict[str, int]]:
    """The listing cut after branches and before the labels that they go to, and the run that follows each label."""
    targets = {item.target for item in listing if isinstance(item, _Code)}
    runs: list[list[_Code]] = [[]]
    labels: dict[str, int] = {}
    for item in listing:
        if isinstance(item, _Code):
            runs[-1].append(item)
        if item in targets or (isinstance(item, _Code) and item.ends_block):
            runs.append([])
        if isinstance(item, str):
            labels[item] = len(runs) - 1
    return runs, labels


_SASS = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_SASS_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def sass_blocks(text: str) -> list[Block]:
    """Basic blocks of what nvdisasm prints for raw instructions: branches go to addresses."""
    listing: list[_Code | str] = []
    for row in text.splitlines():
        if match := _SASS.match(row):
            listing += [str(int(match[1], 16)), _sass_code(match[3], match[4].strip(), match[2])]
    return _blocks(listing)


def _sass_code(opcode: str, operands: str, guard: str | None) -> _Code:
    name, *modifiers = opcode.split(".")
    size = next((_SASS_BYTES[m] for m in modifiers if m in _SASS_BYTES), 4)
    instruction = Instruction(
        opcode,
        guarded=guard is not None,
        loaded=size if name in ("LDG", "LD") else 0,
        stored=size if name in ("STG", "ST") else 0,
        local=name in ("LDL", "STL"),
    )
    if name in ("BRX", "JMP", "JMX", "JMXU", "BRXU"):
        raise ValueError(f"{opcode} {operands} goes to a computed address, which the audit cannot follow")
    ends = name in ("BRA", "EXIT", "RET")
    target = re.search(r"\b0x([0-9a-f]+)$", operands) if name == "BRA" else None
    # A branch may carry its condition before it or, as its first operand, after it.
    conditional = guard is not None or (target is not None and not operands.startswith("0x"))
    label = str(int(target[1], 16)) if target else None
    return _Code(instruction, operands, guard, label, not ends or conditional, ends)


# Older targets say ushort and dwordx4, newer ones u16 and b128.
_AMDGCN_ACCESS = re.compile(r"(buffer|global|flat|scratch)_(load|store)_(\w+)")
_AMDGCN_SIZE = re.compile(r"(?:[us]?(byte|short)|(dword)(?:x(\d))?|(?:d16_)?(?:hi_)?[bui](\d+))(?:_|$)")


def amdgcn_blocks(text: str) -> list[Block]:
    """Basic blocks of amdgcn assembly."""
    listing: list[_Code | str] = []
    for row in text.split(".Lfunc_end", 1)[0].splitlines():
        code = row.split(";", 1)[0]
        if label := re.match(r"(\.?\w+):", code):
            listing.append(label[1])
        elif match := re.match(r"\t([a-z]\w*)\s*(.*)", code):
            listing.append(_amdgcn_code(match[1], match[2].strip()))
    return _blocks(listing)


def _amdgcn_code(opcode: str, operands: str) -> _Code:
    loaded = stored = 0
    local = False
    if match := _AMDGCN_ACCESS.match(opcode):
        space, direction, what = match.groups()
        size = _AMDGCN_SIZE.match(what)
        if size is None:
            raise ValueError(f"{opcode} is an access whose width the audit does not know: add it to its table")
        small, dword, words, bits = size.groups()
        moved = 4 * int(words or 1) if dword else int(bits) // 8 if bits else {"byte": 1, "short": 2}[small]
        local = space == "scratch"
        loaded, stored = (0, 0) if local else (moved, 0) if direction == "load" else (0, moved)
    if opcode in ("s_setpc_b64", "s_swappc_b64"):
        raise ValueError(f"{opcode} {operands} goes to a computed address, which the audit cannot follow")
    jumps = opcode == "s_branch" or opcode.startswith("s_cbranch")
    ends = jumps or opcode == "s_endpgm"
    instruction = Instruction(opcode, loaded=loaded, stored=stored, local=local)
    target = operands if jumps else None
    return _Code(instruction, operands, None, target, opcode.startswith("s_cbranch") or not ends, ends)
