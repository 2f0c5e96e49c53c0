"""The statements of a function of values, walked in order: names are given what their expressions stand for."""

from __future__ import annotations

import ast
import types
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NoReturn

from .advice import BRANCH, STATEMENTS

PLAIN = (bool, int, float, str, types.NoneType)  # what is decided before anything runs


def shared_out(targets: Sequence[ast.expr], values: tuple[Any, ...]) -> list[tuple[ast.expr, Any]] | None:
    """Which target is given which value, or, after a star, which values; None if they are not as many."""
    stars = [i for i, target in enumerate(targets) if isinstance(target, ast.Starred)]
    rest = len(values) - len(targets) + 1  # for the star
    if (not stars and len(targets) != len(values)) or (stars and rest < 0):
        return None
    if not stars:
        return list(zip(targets, values, strict=True))
    (at,) = stars  # Python allows one
    star = targets[at]
    assert isinstance(star, ast.Starred)
    shares: list[Any] = [*values[:at], values[at : at + rest], *values[at + rest :]]
    return list(zip([*targets[:at], star.value, *targets[at + 1 :]], shares, strict=True))


class Statements(ABC):
    """One call of a function.

    Args:
        function: the Python function.
        source: its syntax tree, its file, and the line before its first.
    """

    def __init__(self, function: types.FunctionType, source: tuple[ast.FunctionDef, str, int]) -> None:
        self.function = function
        self.tree, self.file, self.line = source
        self.around = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        self.names: dict[str, Any] = {}
        self.returned: ast.stmt | None = None

    @abstractmethod
    def value(self, node: ast.expr) -> Any:
        """What an expression stands for."""

    @abstractmethod
    def kept(self, name: str, value: Any) -> Any:
        """What a name stands for that is given a value."""

    @abstractmethod
    def refuse(self, node: ast.AST, why: str = "") -> NoReturn:
        """Raise an error of a node."""

    def where(self, node: ast.AST) -> str:
        """File and line of a node."""
        return f"{self.file}, line {self.line + getattr(node, 'lineno', 1)}"

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
            self.names[target.id] = self.kept(target.id, value)
            return
        shares = None
        if isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, tuple):
            shares = shared_out(target.elts, value)
        if shares is None:
            self.refuse(target, "only names can be assigned to, or as many as there are values")
        # All of it first: `p, g = g, p`.
        for one, own in [(one, self.kept(getattr(one, "id", "x"), own)) for one, own in shares]:
            self.assign(one, own)

    def decided(self, test: ast.expr, node: ast.AST) -> bool:
        """Whether a condition on numbers is true."""
        condition = self.value(test)
        if not isinstance(condition, PLAIN):
            self.refuse(node, BRANCH)
        return bool(condition)

    def index(self, node: ast.expr) -> Any:
        """What stands in the brackets of a part of a tuple."""
        if isinstance(node, ast.Slice):
            return slice(*(None if end is None else self.value(end) for end in (node.lower, node.upper, node.step)))
        return self.value(node)
