"""The lines that a rule becomes, and what its names stand for while it is walked."""

from __future__ import annotations

import ast
import types
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from .source import RuleError

WORDS = ("abs", "exp", "floor", "log", "maximum", "minimum", "sign", "sqrt", "where")  # that rules may use

# What a value is: a number for each element, or one for all; a condition, likewise.
VALUE, SCALAR, CONDITION, FLAG = "value", "scalar", "condition", "flag"


@dataclass(frozen=True)
class Value:
    """A value, or a condition, as an expression of earlier lines."""

    kind: str
    node: ast.expr


ONE, ZERO = (Value(SCALAR, ast.Constant(number)) for number in (1.0, 0.0))


@dataclass(frozen=True)
class Word:
    """A word of the language."""

    name: str


@dataclass(frozen=True)
class Scalars:
    """What a rule knows as h; of a wrapper's, what the names begin with."""

    name: str
    prefix: str = ""


class Constant(NamedTuple):
    """A number of a module or of a function around a rule, as it was when the rule was walked."""

    name: str
    scope: Any  # the dict of a module, or a cell
    value: Any

    def check(self, rule: str) -> None:
        """Raise RuleError where it is another number now: no backend would take note of it."""
        now = self.scope.cell_contents if isinstance(self.scope, types.CellType) else self.scope.get(self.name)
        if now is not self.value and repr(now) != repr(self.value):
            raise RuleError(
                f"{self.name}, which the rule {rule} reads, was {self.value!r} when it was first used and is {now!r} "
                "now. A rule keeps its numbers: return what changes from scalars(), or define the rule anew"
            )


class Lines:
    """The lines that a rule becomes.

    Args:
        function: the rule.
        names: of its arguments.
    """

    def __init__(self, function: types.FunctionType, names: Sequence[str]) -> None:
        self.rule = function.__name__
        self.lines: list[ast.stmt] = []
        self.fields: dict[str, str] = {}  # the scalars that are read, and where
        self.constants: dict[tuple[int, str], Constant] = {}
        self.calls: list[types.FunctionType] = []  # that are being followed
        self._names = {*WORDS, "like", "tl", "float"}
        self.arguments = list(map(self.fresh, names))
        self.p = Value(VALUE, ast.Name(self.arguments[0], ast.Load()))

    def fresh(self, name: str) -> str:
        """A name that is not used yet."""
        name = base = name if name.isascii() else "x"
        for number in count(1):
            if name not in self._names:
                break
            name = f"{base}_{number}"
        self._names.add(name)
        return name

    def kept(self, name: str, x: Any) -> Any:
        """What a name stands for: of an expression, a line is made."""
        if isinstance(x, tuple):
            return tuple(self.kept(name, one) for one in x)
        if not isinstance(x, Value) or isinstance(x.node, (ast.Name, ast.Attribute)):
            return x
        name = self.fresh(name)
        self.lines.append(ast.Assign([ast.Name(name, ast.Store())], x.node, lineno=1))
        return Value(x.kind, ast.Name(name, ast.Load()))

    def word(self, name: str, *arguments: Value) -> Value:
        """A call of a word of the language."""
        return Value(VALUE, ast.Call(ast.Name(name, ast.Load()), [x.node for x in arguments], []))

    def like(self, x: Value) -> Value:
        """A number for each element."""
        return x if x.kind == VALUE else self.word("like", x, self.p)
