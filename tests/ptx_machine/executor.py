"""Executes what Triton launches: the `on_launch` of `triton_optim.backends.triton.stub_driver`."""

from __future__ import annotations

import gc
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch

from triton_optim.backends.triton.stub_driver import Launched

from .arithmetic import Approximate
from .global_memory import GlobalMemory, Span
from .machine import Fault, Machine
from .parse import parse

POISONS = (0xA5, 0x5A)  # two bytes that have no bit in common


def parameters(signature: Iterable[Any], arguments: Iterable[Any]) -> Iterator[int]:
    """The bits of the parameters that arguments become; constants become none, and a tuple one for each item.

    Args:
        signature: Triton's types of the arguments.
        arguments: pointers as tensors or addresses.
    """
    for kind, value in zip(signature, arguments, strict=True):
        if kind == "constexpr":
            continue
        if isinstance(kind, (tuple, list)):
            yield from parameters(kind, value)
        elif kind.startswith("*"):
            yield value.data_ptr() if isinstance(value, torch.Tensor) else value or 0
        elif kind in ("fp32", "fp64"):
            yield int.from_bytes(struct.pack("<f" if kind == "fp32" else "<d", value), "little")
        elif kind[0] in "iu" and kind[1:].isdigit():
            yield int(value)
        else:
            raise NotImplementedError(f"the machine takes no argument of type {kind}")


class LiveTensors:
    """The CPU tensors that are alive.

    The garbage collector knows them. It is told to leave alone what there is at the start, or else a look through all
    objects would take longer than the launch.
    """

    _older: ClassVar[list[weakref.ref[torch.Tensor]]] = []  # which the collector no longer knows

    def __init__(self) -> None:
        gc.collect()
        self._older += map(weakref.ref, found_tensors())
        gc.freeze()

    def spans(self) -> list[Span]:
        """Their memory."""
        known = [*found_tensors(), *(t for t in (r() for r in self._older) if t is not None)]
        known += [t.grad for t in known if t.is_leaf and t.grad is not None]  # which may have no Python object yet
        return list({span_of(t) for t in known if t.layout == torch.strided and t.device.type == "cpu" and t.numel()})


def found_tensors() -> list[torch.Tensor]:
    return [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]


def span_of(t: torch.Tensor) -> Span:
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    start = t.data_ptr()
    return Span(start, start + (last + 1) * t.element_size(), f"{str(t.dtype)[6:]} {tuple(t.shape)}")


class Executor:
    """Executes launches, and keeps what is wrong with them.

    Attributes:
        faults: of all launches.
        launches: the names of their kernels.
        spans: what a kernel may touch beside the tensors that are alive.
        edit: changes the PTX before it is executed.
        seed: of random errors of approximate functions; None for none.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.launches: list[str] = []
        self.spans: list[Span] = []
        self.edit: Callable[[str], str] = lambda ptx: ptx
        self.seed: int | None = None
        self._tensors = LiveTensors()

    def __call__(self, launch: Launched) -> None:
        programs, *others = launch.grid
        if others != [1, 1]:
            raise NotImplementedError(f"the machine runs grids of one dimension; this one is {launch.grid}")
        self.launches.append(launch.name)
        kernel = parse(self.edit(launch.ptx))
        arguments = list(parameters(launch.signature.values(), launch.arguments))
        arguments += [0] * (len(kernel.parameters) - len(arguments))  # scratch memory, of which there is none
        spans = self.spans + self._tensors.spans()

        def run(poison: int) -> Machine:
            memory = GlobalMemory(spans)
            approximate = Approximate(self.seed)
            machine = Machine(kernel, programs, arguments, memory, launch.metadata.shared, approximate, poison)
            machine.run()
            return machine

        machine = run(POISONS[0])
        if machine.unwritten:  # half a register may be, of which the other half is used: does it matter?
            machine.memory.undo()
            again = run(POISONS[1])
            if not same_stores(machine.memory, again.memory):
                detail = f"what is stored depends on {machine.unwritten[0]}"
                self.faults.append(Fault("uninitialised", machine.unwritten[0], kernel.name, 1, detail))
        self.faults += machine.faults

    def take_faults(self) -> list[Fault]:
        """The faults so far, which are forgotten."""
        faults, self.faults = self.faults, []
        return faults


def same_stores(a: GlobalMemory, b: GlobalMemory) -> bool:
    """Whether two runs stored the same values at the same addresses in the same order."""
    ours, theirs = a.stored(), b.stored()
    return len(ours) == len(theirs) and all(
        x.address.tobytes() == y.address.tobytes() and x.stored.tobytes() == y.stored.tobytes()
        for x, y in zip(ours, theirs, strict=True)
    )
