"""What the names of a rule stand for: its own, those around it, and the words of the language; all else is refused."""

from __future__ import annotations

import ast
import types
from difflib import get_close_matches
from typing import Any, NoReturn

from .advice import INSTEAD
from .language import PRIMITIVES, tl
from .lines import SCALAR, WORDS, Constant, Lines, Scalars, Value, Word
from .source import RuleError, source_of
from .statements import PLAIN, Statements
from .words import COMPOSED

ALLOWED = (
    f"Rules may use + - * /, whole powers, comparisons, & | ~ of these, {', '.join(WORDS)}, of "
    f"triton_optim.kernels.words {', '.join(COMPOSED)}, and @jit functions of all this."
)


class Names(Statements):
    """One call of a function: its statements, and its names."""

    def __init__(self, lines: Lines, function: types.FunctionType) -> None:
        super().__init__(function, source_of(function))
        self.lines = lines

    def kept(self, name: str, value: Any) -> Any:
        """What a name stands for that is given a value."""
        return self.lines.kept(name, value)

    def refuse(self, node: ast.AST, why: str = "", word: str = "") -> NoReturn:
        """Raise RuleError for a node: where, what, and what to write instead."""
        word = word or ast.unparse(node).splitlines()[0]
        rule, own = self.lines.rule, self.function.__name__
        called = "" if rule == own else f", called by the rule {rule}"
        raise RuleError(
            f"{own} uses `{word}` ({self.where(node)}){called}: {why or 'it is none of the words of rules'}. {ALLOWED}"
        )

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
        if name in WORDS or name in COMPOSED:
            module = "language" if name in WORDS else "words"
            self.refuse(node, f"Import it: from triton_optim.kernels.{module} import {name}")
        builtins = function.__globals__.get("__builtins__", {})
        builtin = name in (builtins if isinstance(builtins, dict) else vars(builtins))
        self.refuse(node, INSTEAD.get(name, "" if builtin else f"it is not defined. {self.nearest(name)}"))

    def nearest(self, name: str) -> str:
        """What may have been meant by a name that nothing has."""
        near = get_close_matches(name, self.names, 1)
        return f"Write {near[0]}, if that was meant" if near else f"Write h.{name}, if scalars() returns it"

    def meant(self, value: Any, node: ast.expr, name: str, scope: Any) -> Any:
        """What a name outside the function stands for."""
        plain = value.value if tl is not None and isinstance(value, tl.constexpr) else value
        if isinstance(plain, PLAIN) or (type(plain) is tuple and all(isinstance(x, PLAIN) for x in plain)):
            self.lines.constants[id(scope), name] = Constant(name, scope, value)
            return plain
        if isinstance(value, types.ModuleType):
            return value
        for word in (*WORDS, "like"):
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
        module = "language" if name in WORDS else "words"
        own = f"Write {name}(x), imported from triton_optim.kernels.{module}"
        return own if name in WORDS or name in COMPOSED else INSTEAD.get(name, "")

    def _attribute(self, node: ast.Attribute) -> Any:
        of, name = self.value(node.value), node.attr
        if isinstance(of, Scalars):
            name = of.prefix + name
            self.lines.fields.setdefault(name, self.where(node))
            return Value(SCALAR, ast.Attribute(ast.Name(of.name, ast.Load()), name, ast.Load()))
        if isinstance(of, types.ModuleType):
            if of is tl and name in WORDS:
                return Word(name)
            if of is tl and name in COMPOSED:
                return COMPOSED[name]
            if hasattr(of, name):
                return self.meant(getattr(of, name), node, name, vars(of))
        last = "it is no scalar: a rule takes p, g, its states in order, and the scalars last"
        self.refuse(node, self.instead(name) or (last if isinstance(of, Value) else ""))
