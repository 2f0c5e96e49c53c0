"""A rule as a list of C++ expressions: the syntax tree of what kernels/straight.py made of it, and those of the codecs,
are walked once, with values that stand for those of elements.

Calls are followed, conditions on constants decided and constants folded, so that what is left is straight: every value
is an expression of earlier ones. It has a shape: of elements, of pairs of elements (of which 4-bit codes are made), of
the block that shares a scale, or one for all. Numbers that are one for all are double: they round once, where they meet
an element, as torch's operators with Python numbers do.
"""

from __future__ import annotations

import ast
import inspect
import operator
import types
from collections.abc import Sequence
from typing import Any, NoReturn

from ...kernels.language import PRIMITIVES, Cpp, tl
from ...kernels.operators import ARITHMETIC, COMPARISONS, OF_CONDITIONS, OF_CONSTANTS, SHIFTS, UNARY
from ...kernels.source import lines_of, python_function, source_of
from ...kernels.statements import Statements

_BITS = OF_CONDITIONS | SHIFTS
ONE, BLOCK, PAIR, ELEMENT = "one", "block", "pair", "element"  # the shapes
FLOAT, DOUBLE, INT, BOOL = "float", "double", "int32_t", "bool"


class UntranslatableError(Exception):
    """A rule uses what has no C++ form, or its source cannot be read."""


class Value:
    """A value in C++: an expression of earlier values.

    Attributes:
        kind: its C++ type.
        shape: one of the shapes above.
        code: the expression, with {0} and so on for the arguments.
        moves: how the arguments' elements become this one's: "" each its own, else "reduce", "deinterleave" or
            "interleave"; "end" each its own, and 0 where an incomplete block has none.
        name: unique among the values of a trace; of a constant, which is not among them, its digits.
    """

    __slots__ = ("arguments", "code", "kind", "moves", "name", "shape")

    def __init__(self, name: str, kind: str, shape: str, code: str, arguments: Sequence[Value], moves: str) -> None:
        self.name, self.kind, self.shape, self.code = name, kind, shape, code
        self.arguments, self.moves = list(arguments), moves


class Trace:
    """The values of a translation, in the order in which they come into being.

    Args:
        real: the type in which a rule's arithmetic is done, "float" or "double".
    """

    def __init__(self, real: str) -> None:
        self.real = real
        self.values: list[Value] = []
        self._sources: dict[Any, tuple[ast.FunctionDef, str, int]] = {}

    def new(
        self, kind: str, shape: str, code: str, arguments: Sequence[Value] = (), name: str = "x", moves: str = ""
    ) -> Value:
        """A value of a name of its own."""
        value = Value(f"{name}_{len(self.values)}", kind, shape, code, arguments, moves)
        self.values.append(value)
        return value

    def as_kind(self, x: Any, kind: str) -> Value:
        """A value or constant as a value of this type."""
        if not isinstance(x, Value):
            return Value(literal(x, kind), kind, ONE, "", (), "")
        return x if x.kind == kind else self.new(kind, x.shape, f"({kind}){{0}}", [x])

    def common(self, *xs: Any) -> list[Value]:
        """Values or constants as values of one type: that of the elements among them, where there are any."""
        own = [x for x in xs if isinstance(x, Value) and (x.shape != ONE or x.kind not in (FLOAT, DOUBLE))]
        kinds = {x.kind for x in own} | {INT for x in xs if isinstance(x, int) and not isinstance(x, bool)}
        fractions = any(isinstance(x, float) or (isinstance(x, Value) and x.kind in (FLOAT, DOUBLE)) for x in xs)
        if DOUBLE in kinds or (fractions and not own):
            kind = DOUBLE
        elif FLOAT in kinds or fractions:
            kind = FLOAT
        else:
            kind = INT if INT in kinds else BOOL
        return [self.as_kind(x, kind) for x in xs]

    def operation(self, code: str, xs: Sequence[Any], kind: str = "") -> Value:
        """An operator on values or constants of one type."""
        arguments = self.common(*xs)
        return self.new(kind or arguments[0].kind, widest(arguments), code, arguments)

    def word(self, name: str, word: Cpp, xs: Sequence[Any]) -> Value:
        """A word of the language."""
        if word.moves:
            arguments = [self.as_kind(x, word.takes or kind_of(x)) for x in self.common(*xs)]
            if any(x.shape != (PAIR if word.moves == "interleave" else ELEMENT) for x in arguments):
                raise UntranslatableError(f"{name} is for whole rows")
            shape = {"reduce": BLOCK, "deinterleave": PAIR, "interleave": ELEMENT}[word.moves]
            return self.new(word.gives or arguments[0].kind, shape, word.code, arguments, name, word.moves)
        if name == "like":
            return self.new(self.real, ELEMENT, word.code, [self.as_kind(xs[0], self.real)], name)
        if name == "where":
            arguments = [self.as_kind(xs[0], BOOL), *self.common(*xs[1:])]
        elif word.takes:
            arguments = [self.as_kind(x, word.takes) for x in xs]
        else:
            arguments = self.common(*xs)
            if arguments[0].kind in (INT, BOOL):
                arguments = [self.as_kind(x, FLOAT) for x in arguments]
        kind = word.gives or arguments[-1].kind
        code = word.code.replace("{f}", "f" if kind == FLOAT else "").replace("{type}", kind)
        return self.new(kind, widest(arguments), code, arguments, name)

    def call(self, function: Any, *arguments: Any) -> Any:
        """What a jit function returns for these values, constants and tuples."""
        own = python_function(function)
        if own not in self._sources:
            if lines_of(own) is None:
                raise UntranslatableError(f"the source of {own.__name__} is not installed. Install its .py file, too")
            self._sources[own] = source_of(own)
        return Walk(self, own, self._sources[own]).run(arguments)


def widest(values: Sequence[Value]) -> str:
    """The shape of what is made of these."""
    shapes = {x.shape for x in values}
    if {PAIR, ELEMENT} <= shapes:
        raise UntranslatableError("elements and pairs of elements have no operation in common")
    return next((shape for shape in (ELEMENT, PAIR, BLOCK) if shape in shapes), ONE)


def kind_of(x: Any) -> str:
    """The type of a value or constant."""
    return x.kind if isinstance(x, Value) else DOUBLE if isinstance(x, float) else INT


def literal(x: Any, kind: str) -> str:
    """A Python number in C++."""
    if kind == BOOL:
        return "true" if x else "false"
    if kind == INT:
        wrapped = (int(x) + 2**31) % 2**32 - 2**31
        return f"({wrapped})" if wrapped > -(2**31) else "(-2147483647 - 1)"
    suffix, x = "f" if kind == FLOAT else "", float(x)
    if x != x:
        return f'__builtin_nan{suffix}("")'
    if x in (float("inf"), -float("inf")):
        return f"({'-' if x < 0 else ''}__builtin_inf{suffix}())"
    return f"({x.hex()}{suffix})"


class Walk(Statements):  # type: ignore[misc]  # kernels/ is untyped
    """One call of a jit function."""

    def __init__(self, trace: Trace, function: types.FunctionType, source: tuple[ast.FunctionDef, str, int]) -> None:
        super().__init__(function, source)
        self.trace = trace

    def kept(self, name: str, value: Any) -> Any:
        """What a name stands for that is given a value, which is named by it."""
        if isinstance(value, Value) and value.name.startswith("x_"):
            value.name = name + value.name[1:]
        return value

    def refuse(self, node: ast.AST, why: str = "") -> NoReturn:
        """Raise what the language of rules does not have."""
        word = ast.unparse(node).splitlines()[0]
        raise UntranslatableError(
            f"{self.function.__name__} uses `{word}` ({self.where(node)}), {why or 'which has no form in C++'}"
        )

    def run(self, arguments: Sequence[Any]) -> Any:
        """Trace a call of a rule, and what it returns."""
        try:
            bound = inspect.signature(self.function).bind(*arguments)
        except TypeError as error:
            raise UntranslatableError(f"{self.function.__name__} is called with other arguments: {error}") from error
        bound.apply_defaults()
        self.names = dict(bound.arguments)
        found = self.body(self.tree.body)
        return None if found is None else found[0]

    def value(self, node: ast.expr) -> Any:
        """What an expression stands for."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.named(node)
        if isinstance(node, ast.Tuple):
            return tuple(map(self.value, node.elts))
        if isinstance(node, ast.IfExp):
            return self.value(node.body if self.decided(node.test, node.test) else node.orelse)
        if isinstance(node, ast.Attribute):
            return self.attribute(node)
        if isinstance(node, ast.Subscript):
            return self.item(node)
        if isinstance(node, ast.Call):
            return self.called(node)
        try:
            return self.operated(node)
        except UntranslatableError as error:
            if "uses `" in str(error):
                raise
            self.refuse(node, str(error))

    def operated(self, node: ast.expr) -> Any:
        """What an operator makes of two values."""
        if isinstance(node, ast.BinOp):
            left, right, kind = self.value(node.left), self.value(node.right), type(node.op)
            constant = not isinstance(left, Value) and not isinstance(right, Value)
            if kind in OF_CONSTANTS and constant:
                return OF_CONSTANTS[kind](left, right)
            sign, of_constants = (ARITHMETIC | _BITS).get(kind, ("", operator.add))
            if sign and (constant or (isinstance(left, tuple) and isinstance(right, tuple))):
                return of_constants(left, right)
            numbers = all(isinstance(x, (Value, int, float)) for x in (left, right))
            if not sign or not numbers:
                self.refuse(node)
            if kind in _BITS and not all(kind_of(x) in (INT, BOOL) for x in (left, right)):
                self.refuse(node, "bits of what is no integer")
            if kind is ast.Div and all(kind_of(x) == INT for x in (left, right)):
                left = self.trace.as_kind(left, FLOAT)
            return self.trace.operation(f"{{0}} {sign} {{1}}", (left, right))
        if isinstance(node, ast.UnaryOp):
            x = self.value(node.operand)
            if not isinstance(x, Value):
                return UNARY[type(node.op)](x)
            if isinstance(node.op, ast.Invert) and x.kind in (INT, BOOL):
                return self.trace.operation("~{0}" if x.kind == INT else "!{0}", (x,))
            if isinstance(node.op, ast.USub) and x.kind != BOOL:
                return self.trace.operation("-{0}", (x,))
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            left, right = self.value(node.left), self.value(node.comparators[0])
            sign, function = COMPARISONS[type(node.ops[0])]
            if isinstance(left, Value) or isinstance(right, Value):
                return self.trace.operation(f"{{0}} {sign} {{1}}", (left, right), BOOL)
            return function(left, right)
        if isinstance(node, ast.BoolOp):
            for one in node.values:
                if self.decided(one, one) == isinstance(node.op, ast.Or):
                    return isinstance(node.op, ast.Or)
            return isinstance(node.op, ast.And)
        self.refuse(node)

    def named(self, node: ast.Name) -> Any:
        """What a name stands for."""
        around = {name: cell.cell_contents for name, cell in self.around.items()}
        for scope in (self.names, around, self.function.__globals__):
            if node.id in scope:
                return self.meant(scope[node.id], node)
        if node.id in ("float", "int"):
            return {"float": float, "int": int}[node.id]
        self.refuse(node)

    def meant(self, value: Any, node: ast.expr) -> Any:
        """What a name stands for."""
        if isinstance(value, (Value, int, float, str, tuple)) or value is None:
            return value
        for name, (in_triton, in_torch, in_cpp) in PRIMITIVES.items():
            if value is in_triton or value is in_torch:
                return name, in_cpp
        if tl is not None and isinstance(value, tl.constexpr):
            return value.value
        if inspect.isfunction(getattr(value, "fn", None)) or (tl is None and inspect.isfunction(value)):
            return value
        self.refuse(node)

    def attribute(self, node: ast.Attribute) -> Any:
        """A field of the scalars, or of a module."""
        of = self.value(node.value)
        if node.attr in getattr(of, "_fields", ()):
            return getattr(of, node.attr)
        self.refuse(node)

    def item(self, node: ast.Subscript) -> Any:
        """A part of a tuple."""
        of = self.value(node.value)
        if not isinstance(of, tuple):
            self.refuse(node)
        return of[self.index(node.slice)]

    def called(self, node: ast.Call) -> Any:
        """What a call of a word, or of another rule, makes."""
        function = self.value(node.func)
        arguments = [self.value(argument) for argument in node.args]
        if node.keywords:
            self.refuse(node, "with named arguments: give them in order")
        if function in (float, int):
            if any(isinstance(x, Value) for x in arguments):
                self.refuse(node)
            return function(*arguments)
        if isinstance(function, tuple):
            name, word = function
            if len(arguments) != word.arguments:
                self.refuse(node, f"and {name} takes {word.arguments} arguments")
            if not all(isinstance(x, (Value, int, float)) for x in arguments):
                self.refuse(node)
            try:
                return self.trace.word(name, word, arguments)
            except UntranslatableError as error:
                self.refuse(node, str(error))
        if function is None or isinstance(function, (Value, int, float, str)):
            self.refuse(node)
        return self.trace.call(function, *arguments)
