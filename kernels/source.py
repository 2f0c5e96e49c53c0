"""The function that a rule is, and its source, of which every backend makes its code."""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
import types
from typing import Any


class RuleError(TypeError):
    """A rule, or a function that it calls, is not of the language of rules, or its source cannot be read."""


def python_function(rule: Any) -> types.FunctionType:
    """The Python function inside a jit function (or the function itself, where there is no Triton)."""
    function = getattr(rule, "fn", rule)
    if not isinstance(function, types.FunctionType):
        raise RuleError(
            f"a rule must be a @jit function; got {rule!r}. Decorate it with triton_optim.kernels.language.jit"
        )
    return function


def lines_of(fn: types.FunctionType) -> list[str] | None:
    """The lines of a function's file as they were when they were first asked for, be it to decorate it: what is made of
    them later must be what was defined. None where only compiled code is installed.
    """
    if "lines" not in fn.__dict__:
        file = fn.__code__.co_filename
        if fn.__name__ == "<lambda>":
            raise RuleError(
                f"a lambda is no rule ({file}, line {fn.__code__.co_firstlineno}): where its source ends can't be "
                "told. Define the rule by def"
            )
        linecache.checkcache(file)
        lines: list[str] | None = linecache.getlines(file, fn.__globals__)
        if len(lines or ()) < fn.__code__.co_firstlineno:
            loader = fn.__globals__.get("__loader__")
            if file.startswith("<") or loader is None or loader.get_source(fn.__module__) is not None:
                raise RuleError(
                    f"the source of {fn.__name__} can't be read ({file}), and every backend makes its code of it. "
                    "Define the function in a file that is there, or in a notebook's cell. Of text that a program "
                    "makes, tell Python first: linecache.cache[name] = (len(text), None, text.splitlines(True), name), "
                    'then exec(compile(text, name, "exec"))'
                )
            lines = None
        fn.lines = lines  # type: ignore[attr-defined]
    return fn.lines  # type: ignore[attr-defined, no-any-return]


def source_of(fn: types.FunctionType) -> tuple[ast.FunctionDef, str, int]:
    """The syntax tree of a function, not to be written, its file, and the line before its first."""
    first, file = fn.__code__.co_firstlineno - 1, fn.__code__.co_filename
    if "tree" not in fn.__dict__:
        fn.tree = tree_of(fn, file, first)  # type: ignore[attr-defined]
    return fn.tree, file, first  # type: ignore[attr-defined]


def tree_of(fn: types.FunctionType, file: str, first: int) -> ast.FunctionDef:
    """The syntax tree of a function whose lines begin after line `first` of a file."""
    lines = lines_of(fn)
    try:
        (tree,) = ast.parse(textwrap.dedent("".join(inspect.getblock((lines or [])[first:])))).body
    except (SyntaxError, ValueError):
        tree = ast.Pass()
    if not isinstance(tree, ast.FunctionDef) or tree.name != fn.__name__:
        raise RuleError(
            f"{file}, line {first + 1}, holds no `def {fn.__name__}`: the file was written after it was "
            "imported. Load the module anew"
        )
    return tree
