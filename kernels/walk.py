"""The walk over a rule's syntax tree: what is no word of the language is refused; what is left is straight lines."""

from __future__ import annotations

import ast
import inspect
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .advice import BRANCH, DTYPE, IN_SCALARS, INSTEAD, LOOP, OF_ALL, OPERATORS, STATEMENTS
from .language import PRIMITIVES, RuleError, python_function, source_of, tl
from .lines import CONDITION, FLAG, ONE, SCALAR, VALUE, WORDS, ZERO, Constant, Lines, Scalars, Value, Word

ALLOWED = f"Rules may use + - * /, comparisons, & | ~ of these, {', '.join(WORDS)}, and @jit functions of all this."

_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_OF_CONDITIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_OF_NUMBERS: dict[type, Callable[[Any, Any], Any]] = {
    **_ARITHMETIC,
    **_OF_CONDITIONS,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.Invert: operator.invert,
    ast.Not: operator.not_,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_NUMBERS = (bool, int, float)
_PLAIN = (bool, int, float, str, types.NoneType)


class Walk:
    """One call of a function."""

    def __init__(self, lines: Lines, function: types.FunctionType) -> None:
        self.lines, self.function = lines, function
        self.tree, self.file, self.line = source_of(function)
        self.around = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        self.names: dict[str, Any] = {}
        self.returned: ast.stmt | None = None

    def where(self, node: ast.AST) -> str:
        """File and line of a node."""
        return f"{self.file}, line {self.line + getattr(node, 'lineno', 1)}"

    def refuse(self, node: ast.AST, why: str = "", word: str = "") -> NoReturn:
        """Raise RuleError for a node: where, what, and what to write instead."""
        word = word or ast.unparse(node).splitlines()[0]
        rule, own = self.lines.rule, self.function.__name__
        called = "" if rule == own else f", called by the rule {rule}"
        raise RuleError(
            f"{own} uses `{word}` ({self.where(node)}){called}: {why or 'it is none of the words of rules'}. {ALLOWED}"
        )

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

    # Statements.

    def body(self, statements: Sequence[ast.stmt]) -> tuple[Any] | None:
        """Walk statements; what a `return` among them returned."""
        for node in statements:
            if isinstance(node, ast.Return):
                self.returned = node
                return (None if node.value is None else self.value(node.value),)
            if isinstance(node, ast.Assign):
                value = self.value(node.value)
                for target in node.targets:
                    self.assign(target, value)
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                self.assign(node.target, self.value(node.value))
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                own = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
                self.assign(node.target, self.value(ast.copy_location(ast.BinOp(own, node.op, node.value), node)))
            elif isinstance(node, ast.If):
                found = self.body(node.body if self.decided(node.test, node) else node.orelse)
                if found is not None:
                    return found
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                self.value(node.value)
            elif not (
                isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            ):
                self.refuse(node, STATEMENTS.get(type(node), ""))
        return None

    def assign(self, target: ast.expr, value: Any) -> None:
        """Give a name a value, or several of a tuple."""
        if isinstance(target, ast.Name):
            self.names[target.id] = self.lines.kept(target.id, value)
        elif isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, tuple) and len(target.elts) == len(value):
            # All of it first: `p, g = g, p`.
            value = [self.lines.kept(getattr(t, "id", "x"), v) for t, v in zip(target.elts, value, strict=True)]
            for one, of_it in zip(target.elts, value, strict=True):
                self.assign(one, of_it)
        else:
            self.refuse(target, "only names can be assigned to, or as many as there are values")

    def decided(self, test: ast.expr, node: ast.AST) -> bool:
        """Whether a condition on numbers is true."""
        condition = self.value(test)
        if not isinstance(condition, _PLAIN):
            self.refuse(node, BRANCH)
        return bool(condition)

    # Expressions.

    def value(self, node: ast.expr) -> Any:
        """What an expression stands for."""
        if isinstance(node, ast.Constant) and isinstance(node.value, _PLAIN):
            return node.value
        if isinstance(node, (ast.Tuple, ast.List)):
            return tuple(map(self.value, node.elts))
        if isinstance(node, ast.IfExp):
            return self.value(node.body if self.decided(node.test, node) else node.orelse)
        walk = getattr(self, f"_{type(node).__name__.lower()}", None)
        if walk is None:
            self.refuse(node, STATEMENTS.get(type(node), ""))
        return walk(node)

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
        if not isinstance(found, _PLAIN):
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
        if kind in _OF_CONDITIONS:
            sides = [x for x in (left, right) if isinstance(x, Value) and x.kind in (CONDITION, FLAG)]
            if len(sides) < 2:
                self.refuse(node, "only conditions are joined by & | ^, each in brackets: (g > 0) & (p > 0)")
            return Value(CONDITION, ast.BinOp(self.condition(sides[0]), node.op, self.condition(sides[1])))
        if kind not in _ARITHMETIC:
            why = OPERATORS.get(kind, "")
            if kind is ast.Pow:
                known = {2: "x * x", 3: "x * x * x", 0.5: "sqrt(x)", -0.5: "1 / sqrt(x)", -1: "1 / x"}
                why = f"Write {known.get(right, 'exp(y * log(x))') if isinstance(right, _PLAIN) else 'exp(y * log(x))'}"
            self.refuse(node, why)
        a, b = self.number(left, node.left), self.number(right, node.right)
        if a.kind == b.kind == SCALAR and kind is not ast.Mult:
            self.refuse(node, IN_SCALARS)
        return Value(VALUE if VALUE in (a.kind, b.kind) else SCALAR, ast.BinOp(a.node, node.op, b.node))

    def _unaryop(self, node: ast.UnaryOp) -> Any:
        x, kind = self.value(node.operand), type(node.op)
        if isinstance(x, bool) and kind is ast.Invert:
            return not x
        if isinstance(x, _PLAIN):
            return self.folded(node, _UNARY[kind], x)
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
        if kind not in _COMPARISONS:
            self.refuse(node)
        if isinstance(left, _PLAIN) and isinstance(right, _PLAIN):
            return self.folded(node, _COMPARISONS[kind], left, right)
        a, b = self.number(left, node.left), self.number(right, node.comparators[0])
        flag = a.kind == b.kind == SCALAR
        return Value(FLAG if flag else CONDITION, ast.Compare(a.node, node.ops, [b.node]))

    def _boolop(self, node: ast.BoolOp) -> Any:
        sign = "&" if isinstance(node.op, ast.And) else "|"
        found: Any = None
        for one in node.values:
            found = self.value(one)
            if not isinstance(found, _PLAIN):
                self.refuse(node, f"Write (x > 0) {sign} (y > 0)")
            if bool(found) == isinstance(node.op, ast.Or):
                break
        return found

    def _name(self, node: ast.Name) -> Any:
        name, function = node.id, self.function
        if name in self.names:
            return self.names[name]
        if name in function.__code__.co_varnames:
            self.refuse(node, "it is read before it is set")
        if name in self.around:
            try:
                return self.meant(self.around[name].cell_contents, node, name, self.around[name])
            except ValueError:
                self.refuse(node, "it is not defined yet")
        if name in function.__globals__:
            return self.meant(function.__globals__[name], node, name, function.__globals__)
        if name in ("float", "int"):
            return {"float": float, "int": int}[name]
        if name in WORDS:
            self.refuse(node, f"Import it: from triton_optim.kernels.language import {name}")
        builtins = function.__globals__.get("__builtins__", {})
        builtin = name in (builtins if isinstance(builtins, dict) else vars(builtins))
        self.refuse(node, INSTEAD.get(name, "" if builtin else "it is not defined"))

    def meant(self, value: Any, node: ast.expr, name: str, scope: Any) -> Any:
        """What a name outside the function stands for."""
        plain = value.value if tl is not None and isinstance(value, tl.constexpr) else value
        if isinstance(plain, _PLAIN) or (type(plain) is tuple and all(isinstance(x, _PLAIN) for x in plain)):
            self.lines.constants[id(scope), name] = Constant(name, scope, value)
            return plain
        if isinstance(value, types.ModuleType):
            return value
        for word in WORDS:
            if value is PRIMITIVES[word][0] or (tl is not None and value is getattr(tl, word, None)):
                return Word(word)
        function = getattr(value, "fn", value)
        of = str(getattr(function, "__module__", "")).split(".")[0]
        if isinstance(function, types.FunctionType) and of not in ("torch", "triton"):
            if function is value and "lines" not in function.__dict__:
                self.refuse(node, "it is a function without @jit. Decorate it with triton_optim.kernels.language.jit")
            return value
        self.refuse(node, self.instead(name))

    def instead(self, name: str) -> str:
        """What to write instead of a call."""
        own = f"Write {name}(x), imported from triton_optim.kernels.language"
        return own if name in WORDS else INSTEAD.get(name, "")

    def _attribute(self, node: ast.Attribute) -> Any:
        of, name = self.value(node.value), node.attr
        if isinstance(of, Scalars):
            self.lines.fields.setdefault(name, self.where(node))
            return Value(SCALAR, ast.Attribute(ast.Name(of.name, ast.Load()), name, ast.Load()))
        if isinstance(of, types.ModuleType):
            if of is tl and name in WORDS:
                return Word(name)
            if hasattr(of, name):
                return self.meant(getattr(of, name), node, name, vars(of))
        self.refuse(node, self.instead(name))

    def _subscript(self, node: ast.Subscript) -> Any:
        of = self.value(node.value)
        if isinstance(of, Scalars):
            self.refuse(node, "Write h.lr: scalars have names")
        if not isinstance(of, tuple):
            self.refuse(node, "a value has no elements here; " + OF_ALL)
        if isinstance(node.slice, ast.Slice):
            ends = (node.slice.lower, node.slice.upper, node.slice.step)
            index: Any = slice(*(None if end is None else self.value(end) for end in ends))
        else:
            index = self.value(node.slice)
        try:
            return of[index]
        except (IndexError, TypeError, ValueError) as error:
            self.refuse(node, str(error))

    def _call(self, node: ast.Call) -> Any:
        function = self.value(node.func)
        if any(isinstance(x, ast.Starred) for x in node.args) or any(x.arg is None for x in node.keywords):
            self.refuse(node, "Write each argument")
        arguments = [self.value(argument) for argument in node.args]
        named = {str(argument.arg): self.value(argument.value) for argument in node.keywords}
        if isinstance(function, Word):
            if named or len(arguments) != PRIMITIVES[function.name][2].arguments:
                self.refuse(node, f"{function.name} takes {PRIMITIVES[function.name][2].arguments} arguments, in order")
            return self.word(function.name, arguments, node)
        if function in (float, int):
            if not all(isinstance(x, _PLAIN) for x in arguments):
                self.refuse(node, DTYPE)
            return self.folded(node, function, *arguments)
        if isinstance(function, (*_PLAIN, tuple, types.ModuleType)):
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
        if all(x.kind == SCALAR for x in numbers):
            constant = all(isinstance(x, _PLAIN) for x in arguments)
            self.refuse(node, "it is of numbers alone. Write its value" if constant else IN_SCALARS)
        return lines.word(name, *map(lines.like, numbers))
