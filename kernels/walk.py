"""The walk over a rule's expressions: what is no word of the language is refused; what is left is straight lines."""

from __future__ import annotations

import ast
import builtins
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from .advice import DTYPE, IN_SCALARS, LOOP, OF_ALL, OPERATORS, STATEMENTS
from .language import PRIMITIVES
from .lines import CONDITION, FLAG, ONE, SCALAR, VALUE, ZERO, Scalars, Value, Word
from .names import Names
from .operators import ARITHMETIC, COMPARISONS, OF_CONDITIONS, OF_CONSTANTS, UNARY
from .source import python_function
from .statements import PLAIN

POWERS = 16  # the largest

_OF_NUMBERS: dict[type, Callable[[Any, Any], Any]] = {
    kind: function for kind, (_, function) in (ARITHMETIC | OF_CONDITIONS).items()
} | OF_CONSTANTS
_NUMBERS = (bool, int, float)


class Walk(Names):
    """One call of a function."""

    def run(self, names: dict[str, Any]) -> Any:
        """What the function returns."""
        if self.function in self.lines.calls:
            self.refuse(self.tree, LOOP, f"{self.function.__name__}()")
        self.lines.calls.append(self.function)
        self.names = names
        found = self.body(self.tree.body)
        self.lines.calls.pop()
        if found is None:
            self.refuse(self.tree, "it returns nothing", f"def {self.tree.name}")
        return found[0]

    def value(self, node: ast.expr) -> Any:
        """What an expression stands for."""
        if isinstance(node, ast.Constant) and isinstance(node.value, PLAIN):
            return node.value
        if isinstance(node, (ast.Tuple, ast.List)):
            return self.values(node.elts)
        if isinstance(node, ast.IfExp):
            return self.value(node.body if self.decided(node.test, node) else node.orelse)
        walk = getattr(self, f"_{type(node).__name__.lower()}", None)
        if walk is None:
            self.refuse(node, STATEMENTS.get(type(node), ""))
        return walk(node)

    def values(self, nodes: Sequence[ast.expr]) -> tuple[Any, ...]:
        """What expressions stand for in a row; of ``*states`` each of them."""
        found: list[Any] = []
        for node in nodes:
            if not isinstance(node, ast.Starred):
                found.append(self.value(node))
                continue
            several = self.value(node.value)
            if not isinstance(several, tuple):
                self.refuse(node, "only of a tuple are there several")
            found += several
        return tuple(found)

    def number(self, x: Any, node: ast.AST | None) -> Value:
        """A value, scalar or constant as an operand."""
        if isinstance(x, Value):
            if x.kind in (VALUE, SCALAR):
                return x
            return self.lines.word("where", x, self.lines.like(ONE), ZERO)
        node = node or self.tree
        if not isinstance(x, (bool, int, float)):
            self.refuse(node, "a number or value is needed")
        try:
            number = float(x)
        except OverflowError:
            self.refuse(node, "the number is too large")
        if number != number:
            return Value(SCALAR, ast.parse('float("nan")', mode="eval").body)
        return Value(SCALAR, ast.Constant(number))

    def condition(self, x: Value) -> ast.expr:
        """A condition for each element. One for all is a Python bool where a rule runs eagerly, of which ~ is -1 or -2;
        and Triton's interpreter cannot join it with others.
        """
        return x.node if x.kind == CONDITION else ast.Compare(self.number(x, None).node, [ast.NotEq()], [ZERO.node])

    def folded(self, node: ast.expr, function: Callable[..., Any], *numbers: Any) -> Any:
        """What comes of constants."""
        try:
            found = function(*numbers)
        except (ArithmeticError, TypeError, ValueError) as error:
            self.refuse(node, f"it has no value: {error}")
        if not isinstance(found, PLAIN):
            self.refuse(node, "it is no real number")
        return found

    def _binop(self, node: ast.BinOp) -> Any:
        left, right, kind = self.value(node.left), self.value(node.right), type(node.op)
        if isinstance(left, _NUMBERS) and isinstance(right, _NUMBERS) and kind in _OF_NUMBERS:
            if kind is ast.Pow and isinstance(left, int) and right * left.bit_length() > 2000:
                self.refuse(node, "the number is too large")
            return self.folded(node, _OF_NUMBERS[kind], left, right)
        if isinstance(left, tuple) and isinstance(right, tuple) and kind is ast.Add:
            return left + right
        if kind in OF_CONDITIONS:
            sides = [x for x in (left, right) if isinstance(x, Value) and x.kind in (CONDITION, FLAG)]
            if len(sides) < 2:
                self.refuse(node, "only conditions are joined by & | ^, each in brackets: (g > 0) & (p > 0)")
            return Value(CONDITION, ast.BinOp(self.condition(sides[0]), node.op, self.condition(sides[1])))
        if kind is ast.Pow and type(right) is int and isinstance(left, Value) and left.kind == VALUE:
            return self.power(left, right, node)
        if kind not in ARITHMETIC:
            why = OPERATORS.get(kind, "")
            if isinstance(left, Value) and left.kind == SCALAR:
                why = IN_SCALARS
            elif kind is ast.Pow:
                known = {2.0: "x**2", 3.0: "x**3", 0.5: "sqrt(x)", -0.5: "1 / sqrt(x)", -1.0: "1 / x"}
                why = f"Write {known.get(right, 'exp(y * log(x))') if isinstance(right, PLAIN) else 'exp(y * log(x))'}"
            self.refuse(node, why)
        a, b = self.number(left, node.left), self.number(right, node.right)
        if a.kind == b.kind == SCALAR and kind is not ast.Mult:
            self.refuse(node, IN_SCALARS)
        return Value(VALUE if VALUE in (a.kind, b.kind) else SCALAR, ast.BinOp(a.node, node.op, b.node))

    def power(self, x: Value, exponent: int, node: ast.AST) -> Value:
        """A whole power: the product of squares of squares."""
        if builtins.abs(exponent) > POWERS:
            self.refuse(node, f"powers go from -{POWERS} to {POWERS}. Write exp({exponent} * log(x))")
        square, product, left = self.lines.kept("x", x), None, builtins.abs(exponent)
        while left:
            if left % 2:
                product = square if product is None else self.product(product, square)
            left //= 2
            square = self.lines.kept("x", self.product(square, square)) if left else square
        if product is None:
            return self.lines.like(ONE)
        return product if exponent > 0 else Value(VALUE, ast.BinOp(ONE.node, ast.Div(), product.node))

    def product(self, x: Value, y: Value) -> Value:
        """One value times another."""
        return Value(VALUE, ast.BinOp(x.node, ast.Mult(), y.node))

    def _unaryop(self, node: ast.UnaryOp) -> Any:
        x, kind = self.value(node.operand), type(node.op)
        if isinstance(x, bool) and kind is ast.Invert:
            return not x
        if isinstance(x, PLAIN):
            return self.folded(node, UNARY[kind], x)
        if isinstance(x, Value) and x.kind in (CONDITION, FLAG):
            if kind is ast.Invert:
                return Value(CONDITION, ast.UnaryOp(node.op, self.condition(x)))
            self.refuse(node, "Write ~ for the opposite of a condition")
        if kind in (ast.Invert, ast.Not):
            self.refuse(node, "the opposite is that of a condition: ~(g > 0)")
        x = self.number(x, node.operand)
        return x if kind is ast.UAdd else Value(x.kind, ast.UnaryOp(node.op, x.node))

    def _compare(self, node: ast.Compare) -> Any:
        if len(node.ops) > 1:
            self.refuse(node, "Write (x < y) & (y < z)")
        left, right, kind = self.value(node.left), self.value(node.comparators[0]), type(node.ops[0])
        if kind not in COMPARISONS:
            self.refuse(node)
        if isinstance(left, PLAIN) and isinstance(right, PLAIN):
            return self.folded(node, COMPARISONS[kind][1], left, right)
        a, b = self.number(left, node.left), self.number(right, node.comparators[0])
        flag = a.kind == b.kind == SCALAR
        return Value(FLAG if flag else CONDITION, ast.Compare(a.node, node.ops, [b.node]))

    def _boolop(self, node: ast.BoolOp) -> Any:
        sign = "&" if isinstance(node.op, ast.And) else "|"
        found: Any = None
        for one in node.values:
            found = self.value(one)
            if not isinstance(found, PLAIN):
                self.refuse(node, f"Write (x > 0) {sign} (y > 0)")
            if bool(found) == isinstance(node.op, ast.Or):
                break
        return found

    def _subscript(self, node: ast.Subscript) -> Any:
        of = self.value(node.value)
        if isinstance(of, Scalars):
            self.refuse(node, "Write h.lr: scalars have names")
        if not isinstance(of, tuple):
            self.refuse(node, "a value has no elements here; " + OF_ALL)
        index = self.index(node.slice)
        try:
            return of[index]
        except (IndexError, TypeError, ValueError) as error:
            self.refuse(node, str(error))

    def _call(self, node: ast.Call) -> Any:
        function = self.value(node.func)
        if any(x.arg is None for x in node.keywords):
            self.refuse(node, "Write each argument")
        arguments = [*self.values(node.args)]
        named = {str(argument.arg): self.value(argument.value) for argument in node.keywords}
        if isinstance(function, Word):
            if named or len(arguments) != PRIMITIVES[function.name][2].arguments:
                self.refuse(node, f"{function.name} takes {PRIMITIVES[function.name][2].arguments} arguments, in order")
            return self.word(function.name, arguments, node)
        if function in (float, int):
            if not all(isinstance(x, PLAIN) for x in arguments):
                self.refuse(node, DTYPE)
            return self.folded(node, function, *arguments)
        if isinstance(function, (*PLAIN, tuple, types.ModuleType)):
            self.refuse(node)
        own = python_function(function)
        try:
            bound = inspect.signature(own).bind(*arguments, **named)
        except TypeError as error:
            self.refuse(node, f"it is called with other arguments: {error}")
        bound.apply_defaults()
        return Walk(self.lines, own).run({k: self.lines.kept(k, x) for k, x in bound.arguments.items()})

    def word(self, name: str, arguments: list[Any], node: ast.Call) -> Any:
        """What a word makes of its arguments."""
        lines, given = self.lines, node.args
        if name == "where":
            condition = arguments[0]
            if isinstance(condition, bool):
                return arguments[1 if condition else 2]
            if not isinstance(condition, Value) or condition.kind not in (CONDITION, FLAG):
                self.refuse(node, "it takes a condition first, such as g > 0")
            x, y = (self.number(x, at) for x, at in zip(arguments[1:], given[1:], strict=True))
            return lines.word(name, condition, x if VALUE in (x.kind, y.kind) else lines.like(x), y)
        numbers = [self.number(x, at) for x, at in zip(arguments, given, strict=True)]
        if name == "like":
            return lines.like(numbers[0])
        if all(x.kind == SCALAR for x in numbers):
            constant = all(isinstance(x, PLAIN) for x in arguments)
            self.refuse(node, "it is of numbers alone. Write its value" if constant else IN_SCALARS)
        return lines.word(name, *map(lines.like, numbers))
