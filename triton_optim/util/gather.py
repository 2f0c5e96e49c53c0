"""Where the gradients of many parameters lie, found in one call: see kernels/cpp/gather.cpp.

The call is compiled against torch's headers, which takes seconds, so that is done beside the first training that goes
on for a while, and kept on disk, where every later one finds it in its first step. Until then, and where it cannot be
compiled, Python looks at every gradient.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
import weakref
from array import array
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..dispatch import this_machine
from . import cpp_build
from .hyperparameters import GroupValues
from .layout import ORDINARY, is_sharded

WORD = ctypes.sizeof(ctypes.c_void_p)
_PARAMS = "params"  # held, so that it stays where it is

# Compiling takes as long as thousands of steps of few parameters, and a short run would not see its end.
WORTHWHILE = 1 << 12  # parameters, times steps that a plan has run
STEPS = 16  # from one look to the next


class Offsets(ctypes.Structure):
    """The offsets of what a DTensor holds, in bytes, and the classes of tensors: kernels/cpp/known_tensors.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("local", "spec", "plain", "sharded")]


@cache
def tensor_offset() -> int | None:
    """The offset of the tensor in its Python object, in bytes; None if that cannot be told.

    It comes first, after what every Python object begins with; up to torch 2.11 a flag stands before it. What is found
    there is compared with what torch itself says.
    """
    made = torch.empty(0, device="cpu")
    first = object.__basicsize__
    for offset in (first, first + WORD):
        if offset < type(made).__basicsize__ and ctypes.c_size_t.from_address(id(made) + offset).value == made._cdata:
            return offset
    return None


def offsets_of(params: Sequence[Tensor]) -> Offsets | None:
    """The offsets for these parameters; None if they cannot be told.

    What a class has in its ``__slots__`` comes in the order of its names, after all that its base class has. What is
    found there is compared with what the attributes are.
    """
    sharded: Any = next(filter(is_sharded, params), None)
    if sharded is None:
        return Offsets(plain=id(Tensor))
    kind: Any = type(sharded)
    slots, start = sorted(getattr(kind, "__slots__", ())), kind.__base__.__basicsize__
    if not {"_local_tensor", "_spec"} <= set(slots) or start + WORD * len(slots) > kind.__basicsize__:
        return None
    local, spec = (start + WORD * slots.index(name) for name in ("_local_tensor", "_spec"))
    found = [ctypes.c_size_t.from_address(id(sharded) + offset).value for offset in (local, spec)]
    return (
        Offsets(local, spec, id(Tensor), id(kind)) if found == [id(sharded._local_tensor), id(sharded._spec)] else None
    )


class Library:
    """The compiled call, one for a process."""

    def __init__(self) -> None:
        self.loaded: Any = None
        self.build_error: str | None = None  # why there is none, once that is known
        self._thread: threading.Thread | None = None
        self._looked_for = False

    def start_build(self) -> None:
        """Compile it, if that was not begun yet, beside what goes on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self.load, daemon=True, name="triton_optim.util.gather")
            self._thread.start()
            atexit.register(self._end)

    def load_built(self) -> None:
        """Take it from disk if it is there, once."""
        if not self._looked_for:
            self._looked_for = True
            if this_machine().cpp and cpp_build.is_built(source(), flags()):
                self.load()

    def load(self) -> None:
        """Compile it, or take it from disk."""
        self._looked_for = True
        try:
            offset = tensor_offset()
            if not this_machine().cpp:
                raise cpp_build.BuildError("it is built on Linux only, and needs a C++ compiler")
            if offset is None:
                raise cpp_build.BuildError(
                    f"torch {torch.__version__} keeps its tensors elsewhere in their Python objects"
                )
            # As a library loads what it needs by name, it finds the one that torch has loaded.
            found = cpp_build.library(source(), flags(), ctypes.PyDLL)
        except cpp_build.BuildError as error:
            self.build_error = str(error)
            return
        table, size = ctypes.c_void_p, ctypes.c_int64
        for name, result, arguments in (
            ("begin", None, (size,)),
            ("note", table, (table, size, table, table, ctypes.py_object, table)),
            ("watch", None, (table, size, table, table)),
            ("forget", None, (table,)),
            ("without", ctypes.c_bool, (size, table)),
            ("method", ctypes.py_object, (size,)),
        ):
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
        for number, name in enumerate(("gather", "groups_hold", "run", "written")):
            setattr(found, name, found.method(number))
        found.begin(offset)
        self.loaded = found

    def _end(self) -> None:
        cpp_build.stop()
        if self._thread is not None:
            self._thread.join(1.0)


library = Library()


def source() -> str:
    """The C++ source, for this torch."""
    text = "".join((files(kernels) / "cpp" / name).read_text() for name in ("known_tensors.h", "gather.cpp"))
    return f"// torch {torch.__version__} {torch.version.git_version}\n{text}"


def flags() -> tuple[str, ...]:
    """The compiler's options."""
    folder = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return ("-std=c++20", "-O2", "-DNDEBUG", "-shared", "-fPIC", abi, f"-I{folder}/include", f"-L{folder}/lib", "-lc10")


class Gatherer:
    """Finds where the gradients of a bucket's parameters lie.

    Args:
        bucket: what the library noted of the parameters, which outlive this.
        addresses: where it puts those of the gradients.
        specs: how their gradients are sharded; None of ordinary ones. Held, so that no other has their address.
        states: of :meth:`watch`.
    """

    def __init__(self, bucket: int, addresses: array[int], specs: Sequence[Any], states: Sequence[Tensor]) -> None:
        self.addresses = addresses
        self.aligned = False  # whether all are multiples of 16
        self.complete = False  # whether none is 0
        self._bucket, self._specs = bucket, specs
        self.watch(states)
        weakref.finalize(self, library.loaded.forget, bucket)

    def watch(self, states: Sequence[Tensor]) -> None:
        """Take note of the states, which are held: of each it is looked whether it lies where it does now, in every
        call to come.
        """
        self._states = states
        objects = array("q", map(id, states))
        sharded = array("q", map(is_sharded, states))
        library.loaded.watch(self._bucket, len(states), objects.buffer_info()[0], sharded.buffer_info()[0])

    def gather(self) -> bool:
        """Bring `addresses` up to date, 0 where there is no gradient. False where Python must look: a parameter or
        state is not what it was, or a gradient is of another dtype, or lies in memory in another way than its
        parameter, or in none.
        """
        found = library.loaded.gather(self._bucket)
        self.aligned, self.complete = found & 1 == 1, found & 2 == 2
        return found >= 0  # type: ignore[no-any-return]

    def written(self) -> None:
        """Tell autograd that the parameters were written."""
        library.loaded.written(self._bucket)

    def run(self, step: int, given: int) -> None:
        """Call a compiled loop that writes them, and tell autograd; addresses of the loop and of what it is given."""
        library.loaded.run(self._bucket, step, given)


def gatherer_of(params: Sequence[Tensor], states: Sequence[Tensor], dtype: torch.dtype) -> Gatherer | None:
    """What finds the gradients of these parameters in the steps to come; None where Python must look at them.

    Args:
        params: sharded ones with gradients like those to come.
        states: the tensors among their states.
        dtype: of the gradients.
    """
    if library.loaded is None or any(type(p) not in ORDINARY and not is_sharded(p) for p in params):
        return None
    specs = [spec_of(p) for p in params]
    offsets = offsets_of(params)
    if offsets is None or any(is_sharded(p) and spec is None for p, spec in zip(params, specs, strict=True)):
        return None
    objects, known = array("q", map(id, params)), array("q", [0 if spec is None else id(spec) for spec in specs])
    like = torch.empty(0, dtype=dtype, device="cpu")
    addresses = array("q", bytes(WORD * len(params)))
    tables = (own.buffer_info()[0] for own in (objects, known))
    bucket = library.loaded.note(ctypes.addressof(offsets), len(params), *tables, like, addresses.buffer_info()[0])
    return None if bucket is None else Gatherer(bucket, addresses, specs, states)


def spec_of(p: Any) -> Any:
    """How the gradient of a parameter is sharded, if it is as the parameter; else None."""
    g = p.grad
    return g._spec if is_sharded(p) and is_sharded(g) and g.placements == p.placements else None


class ParamTable:
    """Parameters that the library can look at, as long as this holds them."""

    def __init__(self, params: list[Tensor]) -> None:
        self._held = params  # so that no other object can take their addresses
        self._table = array("q", map(id, params))
        self.address, self.count = self._table.buffer_info()

    def have_no_gradients(self) -> bool:
        """Whether none of them has a gradient."""
        return not self.count or bool(library.loaded.without(self.count, self.address))


class GroupTable:
    """Parameter groups as they were: of which parameters, and with which hyperparameters.

    Example:
        >>> import torch
        >>> from triton_optim.util.gather import GroupTable, library
        >>> from triton_optim.util.hyperparameters import Hyperparameters
        >>> library.load()
        >>> groups, hyperparameters = [{"params": [torch.zeros(1)], "lr": 0.5}], Hyperparameters()
        >>> hyperparameters.read(groups)
        >>> table = GroupTable(groups, hyperparameters.values)
        >>> table.matches(groups)
        2
        >>> groups[0]["lr"] = 0.25
        >>> table.matches(groups)
        1
        >>> groups[0]["params"] = [torch.zeros(1)]
        >>> table.matches(groups)
        0
    """

    def __init__(self, groups: list[dict[str, Any]], values: Sequence[GroupValues]) -> None:
        self._params = [ParamTable(list(group["params"])) for group in groups]
        self._table = array("q", (len(groups), id(_PARAMS)))
        for params in self._params:
            self._table.extend((0, 0, params.count, params.address))
        self._address, _ = self._table.buffer_info()
        self._held: list[Any] = [None] * len(groups)  # so that no others can take their addresses
        for i, own in enumerate(values):
            self.note_hyperparameters(i, own)

    def note_hyperparameters(self, number: int, own: GroupValues) -> None:
        """Take note of the hyperparameters of a group as they were read. Where one may change and stay the same
        object, they will always be others.
        """
        self._held[number] = names, values = own.names, own.values
        self._table[4 * number + 2] = id(names)
        self._table[4 * number + 3] = id(values) if own.fixed else 0

    def matches(self, groups: Any) -> int:
        """Whether these are groups of the same parameters in the same order, 1, and whether all of their
        hyperparameters are the same objects, too, 2. Else 0.
        """
        return library.loaded.groups_hold(groups, self._address)  # type: ignore[no-any-return]
