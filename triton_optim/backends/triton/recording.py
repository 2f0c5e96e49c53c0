"""What `scalars` does to numbers that only the device knows, recorded as operations that a kernel can do again."""

from __future__ import annotations

import builtins
import dis
import math
from collections.abc import Callable, Hashable
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_BUILTINS = frozenset({abs, bool, float, int, isinstance, len, max, min, pow, round, sum, tuple})


def reads_its_arguments_alone(function: Any) -> bool:
    """Whether a function or bound method, by its code, reads nothing but what it is given, of which `self` is none.

    Example:
        >>> scale = 2.0
        >>> reads_its_arguments_alone(lambda x: max(x, 1))
        True
        >>> reads_its_arguments_alone(lambda x: x * scale)
        False
    """
    bound = getattr(function, "__self__", None) is not None
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType) or function.__closure__:
        return False
    code = function.__code__
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if any(isinstance(x, CodeType) for x in code.co_consts) or not _PLAIN.issuperset(map(type, defaults)):
        return False
    for instruction in dis.get_instructions(code):
        kind, names = instruction.opname, instruction.argval
        if kind in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = function.__globals__.get(names, getattr(builtins, names, None))
            if not (
                value in (torch, math, Tensor)
                or (isinstance(value, type) and hasattr(value, "_fields"))
                or (isinstance(value, FunctionType) and value is not function and reads_its_arguments_alone(value))
                or (isinstance(value, (type, type(abs))) and value in _BUILTINS)
            ):
                return False
        own = bound and "LOAD_FAST" in kind and code.co_varnames[0] in (names if isinstance(names, tuple) else [names])
        if own or kind.startswith(("IMPORT", "LOAD_DEREF", "LOAD_SUPER")):
            return False
    return True


class Unrecorded(Exception):
    """An operation that cannot be recorded, with the reason."""


_PLAIN = frozenset({bool, int, float, str, type(None)})


class Value(NamedTuple):
    """A number: a constant, one that is read, or what comes of others."""

    kind: str  # "constant", "read", or an operation of kernels/rows.py
    of: tuple[int, ...] = ()
    source: Hashable = None  # of a constant its value, of what is read its name


class Recorder(TorchDispatchMode):
    """Notes what is done, while it is the current mode, to the numbers that :meth:`read` gave out.

    These are 0-dim float64 tensors on the CPU. To ask one for its value, be it in an `if`, is an error. They are NaN,
    so that it shows where something else is made of their values.

    Example:
        >>> recorder = Recorder()
        >>> x = recorder.read("x")
        >>> with recorder:
        ...     y = 1 - x**2
        >>> [value.kind for value in recorder.values]
        ['read', 'mul', 'constant', 'sub']
        >>> recorder.number_of(y)
        3
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes longer than a first step

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Value] = []
        self._indices: dict[Value, int] = {}
        self._known: dict[int, tuple[Tensor, int]] = {}  # by id; held, so that none is another's

    def read(self, name: Hashable) -> Tensor:
        """A number that is read; of one name, one."""
        # On the CPU: on the meta device torch imports its compiler to compare two numbers.
        out = torch.full((), float("nan"), dtype=torch.float64, device="cpu")
        self._known[id(out)] = (out, self.note("read", source=name))
        return out

    def note(self, kind: str, *of: Any, source: Hashable = None) -> int:
        """The index of a value among the values; of equal ones, of the first."""
        value = Value(kind, tuple(map(self.number_of, of)), source)
        if value not in self._indices:
            self._indices[value] = len(self.values)
            self.values.append(value)
        return self._indices[value]

    def number_of(self, x: Any) -> int:
        """The index of a tensor's value, or of a number as a constant."""
        if isinstance(x, Tensor):
            if id(x) not in self._known:
                raise Unrecorded("a tensor that was not made of the optimizer's numbers")
            return self._known[id(x)][1]
        if isinstance(x, Index):
            return x
        if isinstance(x, (bool, int, float)):
            if x != x:
                raise Unrecorded("a number that is made of the device's")
            # As text, for 0.0 and -0.0 are equal.
            return self.note("constant", source=float(x).hex())
        raise Unrecorded(f"an operand {x!r}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in _MAKES:
            index = self.number_of(_MAKES[name](*args))
        elif name not in _OPERATIONS:
            raise Unrecorded(f"torch.{name}")
        else:
            index = _OPERATIONS[name](self, *args, **kwargs)
        out = func(*args, **kwargs)
        if out.dim() or out.dtype not in (torch.float64, torch.float32, torch.bool):
            raise Unrecorded(f"torch.{name} to {out.dtype} of shape {tuple(out.shape)}")
        if out.dtype == torch.float32:
            index = self.note("float32", Index(index))
        self._known[id(out)] = (out, index)
        return out


class Index(int):
    """The index of a value, where a number would be a constant."""


def _noted(kind: str) -> Callable[..., int]:
    return lambda recorder, *of: recorder.note(kind, *of)


def _swapped(kind: str) -> Callable[..., int]:
    return lambda recorder, x, y: recorder.note(kind, y, x)


def _add(recorder: Recorder, x: Any, y: Any, alpha: Any = 1) -> int:
    return recorder.note("add", x, y if alpha == 1 else Index(recorder.note("mul", y, alpha)))


def _sub(recorder: Recorder, x: Any, y: Any, alpha: Any = 1) -> int:
    return recorder.note("sub", x, y if alpha == 1 else Index(recorder.note("mul", y, alpha)))


def _rsub(recorder: Recorder, x: Any, y: Any, alpha: Any = 1) -> int:
    return _sub(recorder, y, x, alpha)


def _div(recorder: Recorder, x: Any, y: Any, rounding_mode: str | None = None) -> int:
    if rounding_mode is not None:
        raise Unrecorded(f"a division rounded by {rounding_mode}")
    return recorder.note("div", x, y)


def _pow(recorder: Recorder, x: Any, y: Any) -> int:
    if isinstance(y, (int, float)) and y in (2, 0.5, -0.5, -1):  # more exactly so
        if y == 2:
            return recorder.note("mul", x, x)
        root = x if y == -1 else Index(recorder.note("sqrt", x))
        return root if y == 0.5 else recorder.note("div", 1.0, root)
    return recorder.note("pow", x, y)


def _clamp(recorder: Recorder, x: Any, min: Any = None, max: Any = None) -> int:
    index = Index(recorder.number_of(x))
    if min is not None:
        index = Index(recorder.note("max", index, min))
    return index if max is None else recorder.note("min", index, max)


def _not(recorder: Recorder, x: Any) -> int:
    return recorder.note("eq", x, 0.0)


def _same(recorder: Recorder, x: Any, *_: Any, **__: Any) -> int:
    return recorder.number_of(x)


_MAKES: dict[str, Callable[..., Any]] = {
    "full": lambda size, value: value,
    "lift_fresh": lambda x: x.item(),
    "scalar_tensor": lambda value: value,
}
_OPERATIONS: dict[str, Callable[..., int]] = {
    **{name: _noted(name) for name in ("mul", "lt", "le", "eq", "where", "sqrt", "exp", "log", "abs", "floor")},
    **dict.fromkeys(("_to_copy", "alias", "clone", "detach", "view"), _same),
    **dict.fromkeys(("bitwise_and", "logical_and"), _noted("mul")),
    **dict.fromkeys(("bitwise_or", "logical_or"), _noted("max")),
    **dict.fromkeys(("bitwise_not", "logical_not"), _not),
    "add": _add,
    "clamp": _clamp,
    "clamp_max": lambda recorder, x, most: _clamp(recorder, x, max=most),
    "clamp_min": _clamp,
    "div": _div,
    "ge": _swapped("le"),
    "gt": _swapped("lt"),
    "maximum": _noted("max"),
    "minimum": _noted("min"),
    "ne": lambda recorder, x, y: _not(recorder, Index(recorder.note("eq", x, y))),
    "neg": lambda recorder, x: recorder.note("mul", x, -1.0),
    "pow": _pow,
    "reciprocal": lambda recorder, x: recorder.note("div", 1.0, x),
    "rsqrt": lambda recorder, x: recorder.note("div", 1.0, Index(recorder.note("sqrt", x))),
    "rsub": _rsub,
    "sub": _sub,
}
