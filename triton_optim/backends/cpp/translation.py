"""The translation of an update: a rule and how its roles are kept, traced, and the loop that each value is made in.

What is kept with a scale a block takes several loops: one up to the new values, which wait in a buffer until the
largest of the block is known, and one for the codes. A value is computed in the last loop that is early enough for its
readers.
"""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.average import lerp
from ...kernels.codecs import decode, encode, hashed
from ...precision.codecs import Codec, plain
from .chunks import CHUNK
from .trace import BLOCK, DOUBLE, ELEMENT, FLOAT, INT, ONE, PAIR, Trace, Value

# Of each dtype: its type in memory, and what reads an element of it and makes one.
_STORAGE = {
    torch.float64: ("double", "{0}", "{0}"),
    torch.float32: ("float", "{0}", "{0}"),
    torch.bfloat16: ("uint16_t", "from_bfloat16({0})", "to_bfloat16({0})"),
    torch.float16: ("uint16_t", "from_float16({0})", "to_float16({0})"),
    torch.int8: ("int8_t", "(int32_t){0}", "(int8_t){0}"),
}
# What reads elements in a row and makes them.
_IN_A_ROW = {
    torch.float16: ("from_float16", "to_float16"),
    torch.bfloat16: ("from_bfloat16_pairs", "to_bfloat16_pairs"),
}
# Elements of a row: as many as stay in registers from where they are read to where they are made.
ROW = 32
# Elements that are taken at a time where blocks wait in buffers, which are to stay in the nearest cache. It is more
# than one block, so that what one waits for is hidden behind the other.
BATCH, BLOCKS = 256, 2

_WIDE = {torch.float64: DOUBLE, torch.int8: INT}  # what an element is read as; else float


class Part:
    """A tensor of a role."""

    def __init__(self, number: int, dtype: torch.dtype, elements_per_item: int, padded: bool, rows: bool) -> None:
        self.number, self.dtype, self.elements_per_item = number, dtype, elements_per_item
        self.padded = padded  # there is an item for each element of an incomplete block
        self.kind = _WIDE.get(dtype, FLOAT)
        self.type, self.reading, self.making = _STORAGE[dtype]
        self.in_a_row = _IN_A_ROW[dtype] if rows else None


class Translation:
    """An update's values, what is stored, and which loop each value is computed in."""

    sums = False  # whether it is of a measure, whose values wait in the order of the elements

    def __init__(
        self, rule: Any, scalars: Any, codecs: tuple[Codec, ...], gradient: torch.dtype, averaged: bool
    ) -> None:
        self.scalars, self.codecs, self.averaged = scalars, codecs, averaged
        self.compute = DOUBLE if codecs[0].dtypes[0] == torch.float64 else FLOAT
        self.trace = Trace(self.compute)
        roles = (codecs[0], plain(gradient), *codecs[1:])
        # Rows of bfloat16 are in another order than all else.
        dtypes = {dtype for codec in roles for dtype in codec.dtypes if not self.sums}
        self.pairs = dtypes == {torch.bfloat16}
        in_rows = dtypes if self.pairs else dtypes & {torch.float16}
        of_codes = max(codec.block_size for codec in codecs)
        self.block_size = of_codes or (ROW if in_rows else BATCH if self.sums else 0)
        self.batch = max(BATCH, BLOCKS * of_codes) if of_codes else CHUNK
        self.parts: list[list[Part]] = []
        self.loaded: dict[Value, Part] = {}
        self.stores: list[tuple[Part, Value]] = []
        self.summed: list[Value] = []  # of a measure
        number = 0
        for codec in roles:
            own = zip(codec.dtypes, codec.elements_per_item, strict=True)
            padded = bool(codec.block_size)
            self.parts.append([Part(number + i, d, e, padded, d in in_rows) for i, (d, e) in enumerate(own)])
            number += len(codec.dtypes)
        self.width = 1 + len(scalars._fields) + averaged
        self._translate(rule)
        self._place()

    def _called(self, rule: Any) -> tuple[Any, list[Value], Value | None, list[Value]]:
        """What the rule returns; and the states, their average, and the row of scalars."""
        trace, codecs = self.trace, self.codecs
        number = "with_short_nan(row[{}])" if self.pairs else "row[{}]"
        row = [trace.new(DOUBLE, ONE, number.format(i), name="h") for i in range(self.width)]
        roles = []
        for parts, codec in zip(self.parts, (codecs[0], plain(self.parts[1][0].dtype), *codecs[1:]), strict=True):
            value = self._codec(decode, tuple(map(self._load, parts)), codec.name)
            roles.append(trace.as_kind(value, self.compute))
        p, g, *states = roles
        average = states.pop() if self.averaged else None
        h = self.scalars(*row[1 : 1 + len(self.scalars._fields)])
        new = trace.call(rule, p, trace.operation("{0} * {1}", (g, row[0])), *states, h)
        return new, states, average, row

    def _translate(self, rule: Any) -> None:
        trace, codecs = self.trace, self.codecs
        new, states, average, row = self._called(rule)
        if not isinstance(new, tuple) or len(new) != 1 + len(states):
            raise TypeError(f"the rule returned {new!r}; it must return a tuple of p and its {len(states)} states.")
        bits = None
        if any(codec.random for codec in codecs):
            low, high, first, second = (
                trace.new(INT, ONE, code, name="key") for code in ("low", "high", "key[2]", "key[3]")
            )
            number = trace.new(INT, ELEMENT, f"(int32_t)({self._number()})", name="i")
            index = trace.operation("{0} + {1}", (low, number))
            bits = trace.call(hashed, index, high, first, second)
        written = [self.parts[0], *self.parts[2:]]
        for role, (codec, value) in enumerate(zip(codecs, new, strict=False)):
            stored = self._keep(written[role], codec, trace.as_kind(value, self.compute), bits, role)
            if role == 0 and average is not None:
                again = trace.as_kind(self._codec(decode, stored, codec.name), self.compute)
                new = (*new, trace.call(lerp, average, again, row[-1]))
        if average is not None:
            self._keep(written[-1], codecs[-1], new[-1], bits, len(codecs) - 1)

    def _codec(self, function: Any, *arguments: Any) -> Any:
        """What `decode` or `encode` returns: they are in float32, whatever the rule is in."""
        self.trace.real = FLOAT
        try:
            return self.trace.call(function, *arguments)
        finally:
            self.trace.real = self.compute

    def _number(self) -> str:
        """What an element is among those of a call; of pairs come first all lower halves of a row."""
        first = f"b * {self.block_size} + " if self.block_size else ""
        return f"{first}i % {ROW // 2} * 2 + i / {ROW // 2}" if self.pairs else f"{first}i"

    def _load(self, part: Part) -> Value:
        item = {1: ("[i]", ELEMENT), 2: ("[i]", PAIR)}.get(part.elements_per_item, ("[0]", BLOCK))
        value = self.trace.new(part.kind, item[1], part.reading.format(f"part{part.number}{item[0]}"), name="part")
        self.loaded[value] = part
        return value

    def _keep(self, parts: list[Part], codec: Codec, value: Value, bits: Value | None, role: int) -> tuple[Value, ...]:
        """Note the stores of a new value; what would be read again."""
        trace = self.trace
        if value.shape == ONE:
            value = trace.new(value.kind, ELEMENT, "{0}", [value])
        if codec.block_size:
            value = trace.new(value.kind, ELEMENT, "{0}", [value], "there", "end")
        kept = (value,)
        if codec.name != "plain":
            kept = self._codec(encode, trace.as_kind(value, FLOAT), bits, role, codec.name)
        again = []
        for i, (part, x) in enumerate(zip(parts, kept, strict=True)):
            wide = trace.as_kind(x, part.kind)
            exact = part.dtype == torch.bfloat16 and i == 0 and codec.exact  # it is a bfloat16 number already
            if self.pairs:
                making = "__builtin_bit_cast(int32_t, {0})" if exact else "rounded_bfloat16({0})"
                rounded = trace.new(INT, ELEMENT, making, [wide])
                item = trace.new(part.type, ELEMENT, "", [rounded], "kept")
                again.append(trace.new(FLOAT, ELEMENT, "__builtin_bit_cast(float, {0} & -65536)", [rounded], "again"))
            else:
                making = "upper_half({0})" if exact else part.making
                item = trace.new(part.type, wide.shape, making, [wide], "kept")
                again.append(trace.new(part.kind, wide.shape, part.reading, [item], "again"))
            self.stores.append((part, item))
        return tuple(again)

    def _place(self) -> None:
        """Number the loops, and note in which each value is made and which wait in buffers for later ones."""
        earliest: dict[Value, int] = {}
        for x in self.trace.values:
            earliest[x] = max((earliest[a] + later(a, x) for a in x.arguments if a in earliest), default=0)
        self.loop: dict[Value, int] = {}
        last: dict[Value, int] = {}  # the loop that its first reader is in
        pinned = {item for _, item in self.stores} | {*self.summed}
        for x in reversed(self.trace.values):
            if x in pinned:
                last[x] = earliest[x]
            if x not in last:
                continue  # nobody reads it
            self.loop[x] = earliest[x] if x.moves == "reduce" or x.shape in (ONE, BLOCK) else last[x]
            for a in x.arguments:
                if a in earliest:
                    last[a] = min(last.get(a, self.loop[x]), self.loop[x] - later(a, x))
        self.written = {item: part for part, item in self.stores}
        # Bytes of blocks are widened in a loop of their own, and made in one. So is what is made in a row, unless it is
        # read again: what waits is not what is kept.
        read = {a for x in self.loop for a in x.arguments}
        self.narrow = {
            x: part
            for x, part in {**self.loaded, **self.written}.items()
            if x in self.loop and x.shape != BLOCK
            if part.padded or (part.in_a_row and not (x in self.written and x in read))
        }
        self.waiting = {*self.summed} | {
            a
            for x in self.loop
            for a in x.arguments
            if a.shape in (PAIR, ELEMENT)
            and (x.moves not in ("", "end") or self.loop[a] != self.loop[x] or a.shape != x.shape)
        }


def later(a: Value, x: Value) -> bool:
    """Whether `x` is computed in a later loop than its argument `a`, which all elements of the block are for."""
    return a.moves in ("reduce", "end") or x.moves in ("deinterleave", "interleave")
