"""The C++ source of an update: its translation as loops over the elements of a block or a chunk.

Numbers of 16 bits are read and made by functions for whole rows, which stay in registers meanwhile: in float16 by the
processor, and where all is bfloat16 in pairs, of which the lower halves come first.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from ... import kernels
from ...precision.codecs import Codec
from .trace import BLOCK, ELEMENT, ONE, PAIR, UntranslatableError, Value
from .translation import Part, Translation


def header(name: str) -> str:
    """The text of a C++ file among the kernels."""
    return files(kernels).joinpath("cpp").joinpath(name).read_text()


def storage(dtypes: Container[torch.dtype]) -> str:
    """The C++ text of what reads and makes numbers of these dtypes."""
    return header("storage.h") + (header("float16.h") if torch.float16 in dtypes else "")


# Elements of a loop of known length, before which as many are asked for.
STRIP = 64


class Source(Translation):
    """The text of a translation; see :func:`source`."""

    def expression(self, x: Value) -> str:
        """A traced value as a C++ expression."""
        if x.moves == "deinterleave":
            return f"{x.arguments[0].name}_b[{x.code}]"
        if x.moves == "interleave" or x in self.narrow:
            return f"{x.name}_b[i]"
        own = []
        for a in x.arguments:
            here = a.shape in (ONE, BLOCK) or (self.loop[a] == self.loop[x] and a.shape == x.shape)
            own.append(a.name if here else f"{a.name}_b[i]")
        return x.code.format(*own)

    def lines(self) -> Iterable[str]:
        """The statements of a call: loops over its blocks, one for each number of a loop. What is made in one and read
        in a later one waits in memory.
        """
        live = [x for x in self.trace.values if x in self.loop]
        parts = [part for parts in self.parts for part in parts]
        gradient = self.parts[1][0]
        buffers = {x: x.arguments[0].kind if x in self.narrow and x in self.written else x.kind for x in live
                   if x in self.waiting or x.moves == "interleave" or x in self.narrow}  # fmt: skip
        sizes = {PAIR: self.block_size // 2, ELEMENT: self.block_size, BLOCK: 1}
        # Of a block, read in a later loop than it is made in.
        kept = {a for x in live for a in x.arguments if a.shape == BLOCK and self.loop[a] < self.loop[x]}
        loops = max(self.loop.values()) + 1
        if loops > 1:
            blocks = self.batch // self.block_size
            for x, kind in [*buffers.items(), *((x, x.kind) for x in live if x in kept)]:
                yield f"alignas(64) {kind} {x.name}_a[{blocks * sizes[x.shape]}];"
        yield from self._statements(x for x in live if x.shape == ONE)
        count = f"(n + {self.block_size - 1}) / {self.block_size}" if self.block_size else "1"
        for number in range(loops):
            yield f"for (int64_t b = 0; b < {count}; ++b) {{"
            for part in parts:
                const = "const " if part is gradient else ""
                start = f" + b * {self.block_size // part.elements_per_item}" if self.block_size else ""
                yield f"    {const}{part.type} *part{part.number} = ({const}{part.type} *)parts[{part.number}]{start};"
            for x, kind in buffers.items():
                if loops > 1:
                    yield f"    {kind} *{x.name}_b = {x.name}_a + b * {sizes[x.shape]};"
                else:
                    yield f"    alignas(64) {kind} {x.name}_b[{sizes[x.shape]}];"
            own = [x for x in live if self.loop[x] == number]
            read = {a for x in own for a in x.arguments}
            for x in (x for x in live if x in kept and x in read and self.loop[x] < number):
                yield f"    const {x.kind} {x.name} = {x.name}_a[b];"
            block = self._of_block(live, own, number)
            if not self.block_size:
                yield from (f"    {line}" for line in in_strips(block, self._asked(STRIP)))
            else:
                if number == 0:
                    yield f"    if (asks) {{ {self._asked(self.block_size)} }}"
                yield from (f"    {line}" for line in block)
            for x in (x for x in own if x in kept):
                yield f"    {x.name}_a[b] = {x.name};"
            yield "}"

    def _asked(self, elements: int) -> str:
        """What asks for so many elements further on. Of codes of half a byte it would cost more than it saves."""
        here = "" if self.block_size else " + start"
        parts = [part for parts in self.parts for part in parts if part.elements_per_item == 1]
        return " ".join(f"ask<{elements} * sizeof({x.type})>(part{x.number}{here} + AHEAD);" for x in parts)

    def _of_block(self, live: list[Value], own: list[Value], number: int) -> Iterable[str]:
        yield from self._statements(x for x in own if x.shape == BLOCK and not x.moves)
        size = self.block_size
        for shape, start, end in ((ELEMENT, *((0, size) if size else ("start", "stop"))), (PAIR, 0, size // 2)):
            yield from self._loop([x for x in own if x.shape == shape], start, end)
        for x in (x for x in live if x.moves == "interleave" and self.loop[x] == number + 1):
            first, second = x.arguments
            yield f"for (int64_t i = 0; i < {self.block_size // 2}; ++i) {{"
            yield f"    {x.name}_b[2 * i] = {first.name}_b[i], {x.name}_b[2 * i + 1] = {second.name}_b[i];"
            yield "}"
        for x in (x for x in own if x.moves == "end"):
            yield f"for (int64_t i = n - b * {self.block_size}; i < {self.block_size}; ++i) {x.name}_b[i] = 0;"
        for x in (x for x in own if x.moves == "reduce"):
            yield f"const {x.kind} {x.name} = {x.code}<{self.block_size}>({x.arguments[0].name}_b);"

    def _loop(self, values: list[Value], start: int | str, end: int | str) -> Iterable[str]:
        """A loop for these values. Codes are widened in a loop before it, and made in one after it: in one of both
        widths, as many elements would be taken at a time as a vector has bytes, of which the registers hold few values.
        """
        if not values:
            return
        head = f"for (int64_t i = {start}; i < {end}; ++i)"
        for x in values:
            if x in self.narrow and x not in self.written:
                yield from self._converted(head, end, x, self.narrow[x])
        yield "#pragma omp simd"
        yield f"{head} {{"
        for x in values:
            if x in self.narrow and x in self.written:
                yield f"    {x.name}_b[i] = {x.arguments[0].name};"
                continue
            yield from (f"    {line}" for line in self._statements([x]))
            if x in self.waiting:
                yield f"    {x.name}_b[i] = {x.name};"
        yield "}"
        for x in values:
            if x in self.narrow and x in self.written:
                yield from self._converted(head, end, x, self.narrow[x])

    def _converted(self, head: str, end: int | str, x: Value, part: Part) -> Iterable[str]:
        """What is kept, read into a buffer, or made of one."""
        kept, buffer = f"part{part.number}", f"{x.name}_b"
        made = x in self.written
        if part.in_a_row:
            read, make = part.in_a_row
            yield f"{make}<{end}>({buffer}, {kept});" if made else f"{read}<{end}>({kept}, {buffer});"
        else:
            yield "#pragma omp simd"
            yield f"{head} {kept}[i] = {x.code.format(f'{buffer}[i]')};" if made else f"{head} {buffer}[i] = {x.code};"

    def _statements(self, values: Iterable[Value]) -> Iterable[str]:
        for x in values:
            yield f"const {x.kind} {x.name} = {self.expression(x)};"
            if x in self.written:
                yield f"part{self.written[x].number}[{'0' if x.shape == BLOCK else 'i'}] = {x.name};"

    def text(self) -> str:
        """The whole function."""
        parts = [part for parts in self.parts for part in parts]
        table = ", ".join(f"{{sizeof({p.type}), {p.elements_per_item}, {str(p.padded).lower()}}}" for p in parts)
        lines = "\n".join("    " + line for line in self.lines())
        of_run = f"PARTS, {len(parts)}, {self.parts[1][0].number}, {self.width}, {self.batch}, {self.block_size}"
        return f"""
static constexpr Part PARTS[] = {{{table}}};

static inline __attribute__((always_inline)) void update(UPDATE_PARAMETERS) {{
{lines}
}}

extern "C" void step(const Step *step) {{ run<{of_run}>(update, step); }}
"""


class MeasureSource(Source):
    """The translation of a measure; see :func:`measure_source`."""

    sums = True

    def _translate(self, rule: Any) -> None:
        new, *_ = self._called(rule)
        self.summed = [
            self.trace.new(self.compute, ELEMENT, "{0}", [self.trace.as_kind(x, self.compute)], "summed") for x in new
        ]

    def _of_block(self, live: list[Value], own: list[Value], number: int) -> Iterable[str]:
        """The statements of a block, and then the sums of what was made in it."""
        yield from super()._of_block(live, own, number)
        for i, x in enumerate(self.summed):
            if self.loop[x] == number:
                left, most = f"n - b * {self.block_size}", self.block_size
                into = f"sums[{len(self.summed)} * chunk + {i}]"
                yield f"{into} += sum_of({x.name}_b, {left} < {most} ? {left} : {most});"


def in_strips(lines: Iterable[str], asked: str) -> Iterable[str]:
    """A loop over n elements: as strips where each asks for one further on."""
    yield "const auto elements = [&](int64_t start, int64_t stop) __attribute__((always_inline)) {"
    yield from (f"    {line}" for line in lines)
    yield "};"
    yield "int64_t start = 0;"
    yield f"for (; asks && start + {STRIP} <= n; start += {STRIP}) {{"
    yield f"    {asked}"
    yield f"    elements(start, start + {STRIP});"
    yield "}"
    yield "elements(start, n);"


@cache
def source(rule: Any, scalars: Any, codecs: tuple[Codec, ...], gradient: torch.dtype, averaged: bool) -> str:
    """The C++ source of an update.

    Args:
        rule: and the NamedTuple of its scalars.
        codecs: of the parameter and the states, with `averaged` that of the average last.
        gradient: its dtype.

    Raises:
        UntranslatableError: the rule uses what C++ has no word for.
    """
    return whole(Source(rule, scalars, codecs, gradient, averaged))


def measure_source(measure: Any, scalars: Any, codecs: tuple[Codec, ...], gradient: torch.dtype, averaged: bool) -> str:
    """The C++ source of the sums of a measure over each chunk; arguments as of :func:`source`."""
    return whole(MeasureSource(measure, scalars, codecs, gradient, averaged))


def whole(own: Source) -> str:
    """The text of a library."""
    dtypes = {part.dtype for parts in own.parts for part in parts}
    return storage(dtypes) + header("chunks.h") + header("multi_tensor.h") + own.text()


__all__ = ["UntranslatableError", "header", "source", "storage"]
