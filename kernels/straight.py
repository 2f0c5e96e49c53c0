"""A rule as straight lines of code: its syntax tree is walked once, and what is no word of the language is refused.

Every backend is given what comes of the walk, so that a rule means the same on all of them. Calls of other `@jit`
functions have become their lines. Numbers stand where the names of numbers stood: Triton makes a float32 value of a
number that is given a name. A number that stands where a value must, as in ``where(g > 0, 0.1, 0.2)``, is made one in
the dtype of the parameter.
"""

from __future__ import annotations

import ast
import linecache
import types
from collections.abc import Sequence
from itertools import count
from typing import Any

from .language import PRIMITIVES, jit
from .lines import VALUE, WORDS, Constant, Lines, Scalars, Value
from .source import RuleError, lines_of, python_function, source_of
from .walk import Walk

_numbers = count(1)


def straight(rule: Any) -> Any:
    """The rule as a `@jit` function of straight lines; of one rule, one.

    Raises:
        RuleError: it uses something else than the language has, or a number that it reads has changed.

    Example:
        >>> import inspect
        >>> from triton_optim.kernels.language import jit, python_function
        >>> @jit
        ... def rule(p, g, h):
        ...     factor = 0.5
        ...     g = factor * g
        ...     return (p - h.lr * g,)
        >>> print(inspect.getsource(python_function(straight(rule))))
        def rule(p, g, h):
            g_1 = 0.5 * g
            return (p - h.lr * g_1,)
        <BLANKLINE>
    """
    function = python_function(rule)
    if "constants" in function.__dict__ or lines_of(function) is None:  # it is one, or there is nothing to make it of
        return rule
    known = function.__dict__.get("straight")
    if known is None:
        try:
            known = function.__dict__["straight"] = made_of(function)
        except RecursionError:
            raise RuleError(f"the rule {function.__name__} nests too deeply. Give parts of it names") from None
    check_constants(known)
    return known


def check_constants(rule: Any) -> None:
    """Raise RuleError where a number that a rule of :func:`straight` reads is another now."""
    function = python_function(rule)
    for constant in constants_of(function):
        constant.check(function.__name__)


def constants_of(rule: Any) -> tuple[Constant, ...]:
    """The numbers around it that a rule of :func:`straight` reads."""
    return getattr(python_function(rule), "constants", ())


def check_signature(rule: Any, names: tuple[str, ...], sums: bool = False) -> None:
    """Raise RuleError unless a rule of :func:`straight` takes as many states as are named, and returns as many. They
    may have other names in the rule, but not each other's.

    Args:
        sums: whether it returns what is summed, however many values.
    """
    function, states = python_function(rule), len(names)
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    taken = arguments[2:-1]
    if len(arguments) - 3 != states:
        raise RuleError(
            f"the rule {function.__name__} takes {len(arguments) - 3} states, and its optimizer has {states}. Give it "
            "p, g, then each of states in order, then h"
        )
    if taken != names and sorted(taken) == sorted(names):
        raise RuleError(
            f"the rule {function.__name__} takes its states as {', '.join(taken)}, and its optimizer declares them as "
            f"{', '.join(names)}, the order in which they are given, whatever they are called. Put both in one order"
        )
    if arguments[0] in ("g", "grad", "gradient"):
        raise RuleError(
            f"the rule {function.__name__} takes {arguments[0]} first, where the parameter is given. Give it p, g, "
            "then each of states in order, then h"
        )
    returned = getattr(function, "returned", 1 + states)
    if sums and not returned:
        raise RuleError(f"{function.__name__} returned no value; it must return a tuple of what is to be summed")
    if returned != 1 + states and not sums:
        raise RuleError(
            f"the rule {function.__name__} returned {returned} values; it must return a tuple of p and its {states} "
            "states"
        )


def check_fields(rule: Any, h: Any) -> None:
    """Raise RuleError where a rule of :func:`straight` reads a scalar that is not among these."""
    function = python_function(rule)
    for name, where in getattr(function, "fields", {}).items():
        if name not in h._fields:
            raise RuleError(
                f"{function.__name__} uses `h.{name}` ({where}), and scalars() returned no {name}; it returned "
                f"{', '.join(h._fields)}. Return it from scalars(), too"
            )


def roles_read(rule: Any) -> tuple[int, ...]:
    """Which of p, g and the states the results of a rule of :func:`straight` depend on, by number. No compiler reads
    the others.

    Example:
        >>> from triton_optim.kernels.language import jit
        >>> @jit
        ... def rule(p, g, momentum, h):
        ...     p = p - h.lr * momentum
        ...     return (g * g,)
        >>> roles_read(straight(rule))
        (1,)
    """
    function = python_function(rule)
    if lines_of(function) is None:  # only compiled code is installed: any may be
        return tuple(range(function.__code__.co_argcount - 1))
    tree = source_of(function)[0]
    needed: set[str] = set()
    for line in reversed(tree.body):
        if isinstance(line, ast.Return) or (isinstance(line, ast.Assign) and _names(line.targets[0]) & needed):
            needed |= _names(line)
    return tuple(i for i, argument in enumerate(tree.args.args[:-1]) if argument.arg in needed)


def _names(node: ast.AST) -> set[str]:
    """Those of an expression; of what a number is made like, only the shape is read."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "like":
        node = node.args[0]
    own = {node.id} if isinstance(node, ast.Name) else set()
    return own.union(*map(_names, ast.iter_child_nodes(node)))


def composed(wrapper: Any, base: Any, states: Sequence[str], own: Sequence[str] = (), prefix: str = "") -> Any:
    """A rule around another as one rule of straight lines.

    Args:
        wrapper: a ``@jit`` function ``wrapper(base, p, g, states, h, own, w)`` that calls ``base(p, g, *states, h)``
            and returns what its rule is to return. `states` and `own` are tuples: the states of the base and the
            wrapper's. `h` and `w` are their scalars.
        base: the rule that is wrapped.
        states, own: the names of these states.
        prefix: what the names of the wrapper's scalars begin with among all.

    Example:
        >>> import inspect
        >>> from triton_optim.kernels.language import jit
        >>> from triton_optim.kernels.source import python_function
        >>> @jit
        ... def descent(p, g, h):
        ...     return (p - h.lr * g,)
        >>> @jit
        ... def halved(base, p, g, states, h, own, w):
        ...     step, *states = base(0.0, g, *states, h)
        ...     return p + 0.5 * step, *states
        >>> print(inspect.getsource(python_function(composed(halved, descent, ()))))
        def halved_descent(p, g, h):
            step = 0.0 - h.lr * g
            return (p + 0.5 * step,)
        <BLANKLINE>
    """
    function = python_function(wrapper)
    lines = Lines(function, ["p", "g", *states, *own, "h"])
    p, g, *values = (Value(VALUE, ast.Name(name, ast.Load())) for name in lines.arguments[:-1])
    walk = Walk(lines, function)
    count = len(states)
    h = lines.arguments[-1]
    given = (base, p, g, tuple(values[:count]), Scalars(h), tuple(values[count:]), Scalars(h, prefix))
    found = walk.run(dict(zip(function.__code__.co_varnames, given, strict=False)))
    made = finished(f"{function.__name__}_{python_function(base).__name__}", walk, found, len(values))
    python_function(made).constants += constants_of(base)
    return made


def made_of(function: types.FunctionType) -> Any:
    """The function of the lines, by the name of the rule's."""
    tree, file, line = source_of(function)
    given = tree.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    if given.vararg or given.kwarg or given.kwonlyargs or given.defaults or len(names) < 3:
        raise RuleError(
            f"{function.__name__} ({file}, line {line + tree.lineno}) is no rule: a rule takes p, g, its states and h, "
            "each by a name of its own, without defaults. Write it so"
        )
    lines = Lines(function, names)
    walk = Walk(lines, function)
    roles = [Value(VALUE, ast.Name(name, ast.Load())) for name in lines.arguments[:-1]]
    found = walk.run(dict(zip(names, [*roles, Scalars(lines.arguments[-1])], strict=True)))
    return finished(function.__name__, walk, found, len(names) - 3)


def finished(name: str, walk: Walk, found: Any, states: int) -> Any:
    """The function of the lines of a walk.

    Args:
        name: of the function.
        found: what the walked function returned.
        states: how many it takes.
    """
    lines, function = walk.lines, walk.function
    if not isinstance(found, tuple):
        alone = "" if states else ", so (p,)"
        walk.refuse(
            walk.returned or walk.tree,
            f"it must return a tuple of p and its {states} states{alone}, or, as a measure, of what is to be summed",
        )
    new = [lines.like(walk.number(x, walk.returned)).node for x in found]
    lines.lines.append(ast.Return(ast.Tuple(new, ast.Load())))
    arguments = ast.arguments([], [ast.arg(argument) for argument in lines.arguments], None, [], [], None, [])
    straightened = ast.FunctionDef(name, arguments, lines.lines, [], None, lineno=1, col_offset=0)
    straightened.type_params = []  # type: ignore[attr-defined]  # from Python 3.12 on
    text = ast.unparse(straightened) + "\n"
    # Triton and tracebacks read it there. Of an entry without a time nothing is looked for on disk.
    file = f"<the rule {name}, {next(_numbers)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    words: dict[str, Any] = {word: PRIMITIVES[word][0] for word in (*WORDS, "like")}
    scope: dict[str, Any] = {}
    exec(compile(text, file, "exec"), words, scope)
    made = scope[name]
    made.__module__, made.__qualname__ = function.__module__, name
    made.fields, made.constants, made.returned = lines.fields, tuple(lines.constants.values()), len(new)
    return jit(made)
