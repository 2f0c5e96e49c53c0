"""The words a rule may use, in one table with a column a backend, and the step from a rule to its torch form.

A rule is a ``@jit`` function on values: no pointers, masks, dtypes or offsets. straight.py checks it and makes
straight lines of it, which Triton compiles. With their globals bound to the torch column they are what
``torch.compile`` compiles and what runs eagerly; the C++ column is for the loop that is made of their syntax tree. A
rule may import the words below by name, or write ``import triton.language as tl`` and use ``tl.exp`` and the like,
which are the same words.
"""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from .source import RuleError, lines_of, python_function  # noqa: F401  users catch RuleError by the name of this module

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

# Triton reads the source of what it compiles.
HAS_SOURCE = not __file__.endswith(".pyc")


def _bitcast_to_int(x: torch.Tensor) -> torch.Tensor:
    """The bits of float32 numbers, as int32."""
    return x.view(torch.int32)


def _bitcast_to_float(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.float32)


def _to_int(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.int32)


def _to_float(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32)


def _absmax(x: torch.Tensor) -> torch.Tensor:
    """The largest |x| of each row of float32 numbers, which stays a dimension; of one with a NaN, NaN or Inf."""
    return x.abs().amax(-1, keepdim=True)


def _evens(x: torch.Tensor) -> torch.Tensor:
    """Every second element of a row, from the first on."""
    return x[..., ::2]


def _odds(x: torch.Tensor) -> torch.Tensor:
    return x[..., 1::2]


def _interleave(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One of `x`, one of `y`, in a row twice as long."""
    return torch.stack((x, y), -1).flatten(-2)


def _like(x: Any, p: torch.Tensor) -> torch.Tensor:
    """A number, or a value of one element, as a value of the dtype and the shape of `p`."""
    return x.to(p.dtype).expand_as(p) if isinstance(x, torch.Tensor) else torch.full_like(p, x)


def _where(condition: Any, x: Any, y: Any) -> Any:
    """torch.where, also of a condition on scalars, which is a Python one where a rule runs eagerly."""
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, x, y)
    taken, other = (x, y) if condition else (y, x)
    return _like(taken, other) if isinstance(other, torch.Tensor) and not isinstance(taken, torch.Tensor) else taken


if triton is not None and HAS_SOURCE:

    def jit(fn: Callable[..., Any]) -> Any:
        """``triton.jit`` for rules. Triton's interpreter insists on finding its language among a function's globals."""
        fn.__globals__.setdefault("tl", tl)
        return fn if lines_of(python_function(fn)) is None else triton.jit(fn)

    @jit
    def abs(x):
        """Its magnitude."""
        return tl.abs(x)

    @jit
    def absmax(x):
        """The largest magnitude of each row; infinite where one is NaN."""
        size = tl.abs(x)
        return tl.max(tl.where(size == size, size, float("inf")), axis=1, keep_dims=True)  # which drops NaN

    @jit
    def bitcast_to_int(x):
        """The bits of float32 numbers, as int32."""
        return x.to(tl.int32, bitcast=True)

    @jit
    def bitcast_to_float(x):
        """The float32 numbers of int32 bits."""
        return x.to(tl.float32, bitcast=True)

    @jit
    def evens(x):
        """Every second element of a row, from the first on."""
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))[0]

    @jit
    def exp(x):
        """e to its power."""
        return tl.exp(x)

    @jit
    def floor(x):
        """The largest whole number that is not above it."""
        return tl.floor(x)

    @jit
    def interleave(x, y):
        """One of `x`, one of `y`, in a row twice as long."""
        return tl.interleave(x, y)

    @jit
    def like(x, p):
        """A number as a value of the dtype and the shape of `p`."""
        return tl.full(p.shape, x, p.dtype)

    @jit
    def log(x):
        """Its natural logarithm."""
        return tl.log(x)

    # NaN goes through, as in torch; Triton's own drop it.
    @jit
    def maximum(x, y):
        """The larger of two; NaN where one is."""
        return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)

    @jit
    def minimum(x, y):
        """The smaller of two; NaN where one is."""
        return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)

    @jit
    def odds(x):
        """Every second element of a row, from the second on."""
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))[1]

    @jit
    def sign(x):
        """1, 0 or -1; 0 of NaN."""
        return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)

    # Correctly rounded, as in C++: Triton's own of float32 is approximate, and takes a subnormal number for 0. `/` is
    # within 2 ulp in float32: its error reaches a parameter scaled by lr, far under the parameter's own rounding.
    @jit
    def sqrt(x):
        """Its root; correctly rounded in float32."""
        return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)

    @jit
    def to_float(x):
        """As float32."""
        return x.to(tl.float32)

    @jit
    def to_int(x):
        """As int32, rounded towards 0."""
        return x.to(tl.int32)

    @jit
    def where(condition, x, y):
        """`x` where the condition holds, else `y`."""
        return tl.where(condition, x, y)

else:

    def jit(fn: Callable[..., Any]) -> Any:
        lines_of(python_function(fn))
        return fn

    abs, exp, floor, log, sign, sqrt = torch.abs, torch.exp, torch.floor, torch.log, torch.sign, torch.sqrt
    maximum, minimum, where, like = torch.maximum, torch.minimum, _where, _like
    bitcast_to_int, bitcast_to_float, to_float, to_int = _bitcast_to_int, _bitcast_to_float, _to_float, _to_int
    absmax, evens, odds, interleave = _absmax, _evens, _odds, _interleave


class Cpp(NamedTuple):
    """A word in C++.

    Attributes:
        code: an expression of the arguments {0}, {1} and so on; {f} is "f" for float and nothing for double, {type} the
            type. Of words for rows: the function that makes one number of a row ("reduce"), or which elements of the
            row are taken ("deinterleave"), or made of each pair ("interleave").
        arguments: how many.
        takes, gives: the type of the arguments and of the result; where empty, floating-point, and the arguments'.
        moves: of words for rows, the kind above.
    """

    code: str
    arguments: int = 1
    takes: str = ""
    gives: str = ""
    moves: str = ""


# Triton's word, torch's function, and the C++ expression.
PRIMITIVES: dict[str, tuple[Any, Callable[..., Any], Cpp]] = {
    "abs": (abs, torch.abs, Cpp("__builtin_fabs{f}({0})")),
    "absmax": (absmax, _absmax, Cpp("absmax", 1, "float", "float", moves="reduce")),
    "bitcast_to_int": (bitcast_to_int, _bitcast_to_int, Cpp("__builtin_bit_cast(int32_t, {0})", 1, "float", "int32_t")),
    "evens": (evens, _evens, Cpp("2 * i", moves="deinterleave")),
    "exp": (exp, torch.exp, Cpp("__builtin_exp{f}({0})")),
    "floor": (floor, torch.floor, Cpp("__builtin_floor{f}({0})")),
    "interleave": (interleave, _interleave, Cpp("2 * i, 2 * i + 1", 2, moves="interleave")),
    "like": (like, _like, Cpp("{0}", 2)),
    "log": (log, torch.log, Cpp("__builtin_log{f}({0})")),
    "maximum": (maximum, torch.maximum, Cpp("{0} <= {1} | {1} != {1} ? {1} : {0}", 2)),
    "minimum": (minimum, torch.minimum, Cpp("{0} >= {1} | {1} != {1} ? {1} : {0}", 2)),
    "bitcast_to_float": (
        bitcast_to_float,
        _bitcast_to_float,
        Cpp("__builtin_bit_cast(float, {0})", 1, "int32_t", "float"),
    ),
    "odds": (odds, _odds, Cpp("2 * i + 1", moves="deinterleave")),
    "sign": (sign, torch.sign, Cpp("({type})(({0} > 0) - ({0} < 0))")),
    "sqrt": (sqrt, torch.sqrt, Cpp("__builtin_sqrt{f}({0})")),
    "to_float": (to_float, _to_float, Cpp("(float){0}", 1, "", "float")),
    "to_int": (to_int, _to_int, Cpp("(int32_t){0}", 1, "", "int32_t")),
    "where": (where, _where, Cpp("{0} ? {1} : {2}", 3)),
}

_torch_column = types.SimpleNamespace(**{name: function for name, (_, function, _) in PRIMITIVES.items()})


@cache
def torch_form(rule: Any) -> Callable[..., Any]:
    """The same function with Triton's words replaced by torch's, in it and in every jit function it calls.

    Example:
        >>> import torch
        >>> from triton_optim.kernels.language import jit, sqrt, torch_form
        >>> @jit
        ... def root(x):
        ...     return sqrt(x)
        >>> torch_form(root)(torch.tensor(4.0))
        tensor(2.)
    """
    function = python_function(rule)
    names = _names(function.__code__)
    # No __name__ among the globals: Dynamo would follow it back to the module and find Triton's words there.
    bound: dict[str, Any] = {"__builtins__": builtins}
    bound.update({name: _torch_value(value) for name, value in function.__globals__.items() if name in names})
    cells = tuple(types.CellType(_torch_value(cell.cell_contents)) for cell in function.__closure__ or ())
    return types.FunctionType(function.__code__, bound, function.__name__, function.__defaults__, cells)


def results(rule: Callable[..., Any], values: list[torch.Tensor], h: Any) -> list[torch.Tensor]:
    """What a rule's torch form returns for the values of p, g and the states: those of p and the states."""
    new = rule(*values, h)
    if not isinstance(new, tuple) or len(new) != len(values) - 1:
        raise TypeError(f"the rule returned {new!r}; it must return a tuple of p and its {len(values) - 2} states.")
    # A rule may return one of its arguments; it must not change when the tensor it came from is written.
    return [v.clone() if any(v is old for old in values) else v for v in new]


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _torch_value(value: Any) -> Any:
    for triton_word, torch_word, _ in PRIMITIVES.values():
        if value is triton_word:
            return torch_word
    if triton is None:
        return value
    if value is tl:
        return _torch_column
    if isinstance(value, tl.constexpr):
        return value.value
    if isinstance(getattr(value, "fn", None), types.FunctionType):
        return torch_form(value)
    return value
