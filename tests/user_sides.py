"""What actions of users are done to: a side, which is ours, or torch's beside it, and the memory around its tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

CANARY = 12345.0
PAD = 16
LAYOUTS = ("plain", "transposed", "gaps", "shifted", "padded")
SHAPES = ((4, 3), (3,), (), (1,), (0,), (5, 1), (2, 3, 4), (2, 2, 2, 2), (7,))

Action = Callable[["Side", random.Random], None]


def action(table: dict[str, Action]) -> Callable[[Action], Action]:
    """Enter the decorated function in a table, by its name."""

    def enter(function: Action) -> Action:
        table[function.__name__] = function
        return function

    return enter


class Memory:
    """Memory that no step may write: what lies around a tensor, and what was replaced.

    Args:
        remembers: whether what is replaced is kept. Without, it is freed, and its address is soon another tensor's.
    """

    def __init__(self, remembers: bool) -> None:
        self._remembers = remembers
        self._around: list[tuple[Tensor, Tensor]] = []
        self._replaced: list[tuple[Tensor, Tensor]] = []

    def guard(self, buffer: Tensor, view: Tensor) -> None:
        """Watch the elements of `buffer` that are not of `view`."""
        inside = torch.zeros(len(buffer), dtype=torch.bool)
        inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        self._around.append((buffer, ~inside))

    def replaced(self, tensor: Tensor) -> None:
        """Watch a tensor that the optimizer has no more."""
        if self._remembers and tensor.numel():
            self._replaced.append((tensor.detach(), tensor.detach().clone()))

    def forget(self, tensor: Tensor) -> None:
        """Watch nothing of a storage that is about to be resized."""
        own = storage_of(tensor)
        self._around = [pair for pair in self._around if storage_of(pair[0]) != own]
        self._replaced = [pair for pair in self._replaced if storage_of(pair[0]) != own]

    def check(self, live: list[Tensor]) -> None:
        for buffer, outside in self._around:
            assert bool((buffer[outside] == CANARY).all()), "a step wrote beside a tensor"
        used = set(map(storage_of, live))
        for tensor, before in self._replaced:
            if storage_of(tensor) in used:
                before.copy_(tensor)
            else:
                assert equal(tensor, before), "a step wrote a tensor that had been replaced"


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


class Side:
    """Parameters and their optimizer.

    Args:
        make: makes an optimizer of this side from groups.
        groups: of new parameters.
        memory: to watch; None for torch's.
        shapes: that parameters may have.
        counted: the states that are numbers which the host counts.
    """

    def __init__(
        self,
        make: Callable[[Any], Any],
        groups: Any,
        memory: Memory | None,
        shapes: tuple[tuple[int, ...], ...],
        counted: frozenset[str],
    ) -> None:
        self.make, self.memory, self.shapes, self.counted = make, memory, shapes, counted
        self.opt = make(groups)
        self.spare: list[Parameter] = []
        self.saved: Any = None

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.opt.param_groups

    @property
    def params(self) -> list[Parameter]:
        return [p for group in self.groups for p in group["params"]]

    def pick(self, draw: random.Random) -> Parameter:
        """Any of the parameters, often one in the middle."""
        return draw.choice(self.params)

    def states(self) -> Iterator[tuple[Parameter, str, Tensor]]:
        """Every state that has elements, with its parameter and name; those of a parameter in the order of their names,
        which is that of both sides.
        """
        for p in self.params:
            for name, value in sorted(self.opt.state.get(p, {}).items()):
                if isinstance(value, Tensor) and name not in self.counted and value.numel():
                    yield p, name, value

    def pick_state(self, draw: random.Random) -> tuple[Parameter, str, Tensor] | None:
        found = list(self.states())
        return draw.choice(found) if found else None

    def counts(self) -> list[Tensor]:
        """The steps of all parameters that have one as a tensor."""
        steps = [self.opt.state.get(p, {}).get("step") for p in self.params]
        return [step for step in steps if isinstance(step, Tensor)]

    def laid(self, value: Tensor, how: str) -> Tensor:
        """A copy of `value`, lying in memory as `how` says."""
        value = value.detach()
        order = list(range(value.dim()))[::-1]
        if how == "transposed":
            return value.permute(order).contiguous().permute(order).clone(memory_format=torch.preserve_format)
        if how == "plain" or not value.is_floating_point():
            return value.clone(memory_format=torch.contiguous_format)
        apart = 2 if how == "gaps" else 1
        strides = [apart * math.prod(value.shape[d + 1 :]) for d in range(value.dim())]
        buffer = torch.full((2 * PAD + apart * value.numel(),), CANARY, dtype=value.dtype)
        view = buffer.as_strided(value.shape, strides, PAD + (how == "shifted"))
        view.copy_(value)
        if self.memory is not None:
            self.memory.guard(buffer, view)
        return view

    def replaced(self, tensor: Any) -> None:
        if self.memory is not None and isinstance(tensor, Tensor):
            self.memory.replaced(tensor)

    def forget(self, tensor: Tensor) -> None:
        if self.memory is not None:
            self.memory.forget(tensor)

    def new_parameter(self, draw: random.Random, dtype: torch.dtype | None = None) -> Parameter:
        dtype = dtype or (self.params[0].dtype if self.params else torch.float32)
        return Parameter(self.laid(values(draw, draw.choice(self.shapes), dtype), draw.choice(DENSE)))


# Hyperparameters that are left: torch takes those of the constructor, whatever a group says; and what divides by 0.
STARTS = ("eps", "initial_accumulator_value")
DENSE = ("plain", "plain", "transposed", "shifted", "padded")


def values(draw: random.Random, shape: Any, dtype: torch.dtype) -> Tensor:
    """Normally distributed."""
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    return torch.randn(tuple(shape), generator=generator, dtype=dtype if dtype.is_complex else None).to(dtype)


def writable(tensor: Tensor) -> bool:
    """Whether torch can write it in place."""
    return not tensor.is_inference() and all(n < 2 or s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def resizable(tensor: Tensor) -> bool:
    """Whether torch can resize its memory. Of what is shared between processes it can't, and does not say so."""
    return tensor.untyped_storage().resizable() and not tensor.is_shared()


def two_alike(side: Side, draw: random.Random) -> tuple[Parameter | None, Parameter | None]:
    """Two parameters of one shape and dtype."""
    p = side.pick(draw)
    others = [q for q in side.params if q is not p and q.shape == p.shape and q.dtype == p.dtype]
    return (p, draw.choice(others)) if others else (None, None)
