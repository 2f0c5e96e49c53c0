"""A wrapper subclass: a tensor that has elements and no address, as torchao's and others' have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map, tree_map_only


class TwoTensor(Tensor):
    """Two tensors of the same kind as one. Every operation is done to each of them; a number that an operation
    returns must be that of both. It has no memory of its own: its ``data_ptr()`` is 0.

    Args:
        first: the one that says what dtype, device, shape and strides the whole has.
        second: the other; left out, a copy of the first.
    """

    first: Tensor
    second: Tensor

    @staticmethod
    def __new__(cls, first: Tensor, second: Tensor | None = None) -> TwoTensor:
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            first.shape,
            strides=first.stride(),
            storage_offset=first.storage_offset(),
            dtype=first.dtype,
            layout=first.layout,
            device=first.device,
            requires_grad=first.requires_grad,
        )
        return made  # type: ignore[no-any-return]

    def __init__(self, first: Tensor, second: Tensor | None = None) -> None:
        self.first = first
        self.second = first.detach().clone(memory_format=torch.preserve_format) if second is None else second
        kinds = [(t.shape, t.stride(), t.dtype, t.device) for t in (self.first, self.second)]
        assert kinds[0] == kinds[1], kinds

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"TwoTensor({self.first!r}, {self.second!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["first", "second"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: Any, size: Any, stride: Any) -> TwoTensor:
        return TwoTensor(inner["first"], inner["second"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})

        def on(side: str) -> Any:
            own_args, own_kwargs = tree_map_only(cls, lambda t: getattr(t, side), given)
            return func(*own_args, **own_kwargs)

        def joined(one: Any, other: Any) -> Any:
            if isinstance(one, Tensor):
                return cls(one, other)
            assert one == other or (one != one and other != other), f"{func} gives {one} and {other}"
            return one

        result = tree_map(joined, on("first"), on("second"))
        return return_and_correct_aliasing(func, *given, result)


def parameter(value: Tensor) -> torch.nn.Parameter:
    """A parameter that holds `value` twice."""
    return torch.nn.Parameter(TwoTensor(value.detach().clone(memory_format=torch.preserve_format)))


def value_of(tensor: Tensor) -> Tensor:
    """What it holds, an ordinary tensor. Both of its tensors must hold the same."""
    own = tensor.detach()
    assert type(own) is TwoTensor, type(own)
    torch.testing.assert_close(own.second, own.first, rtol=0, atol=0, equal_nan=True)
    return own.first
