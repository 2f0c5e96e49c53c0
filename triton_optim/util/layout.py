"""How tensors lie in memory: density, overlap, flat views, and the local part of sharded ones."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from ..dispatch import Layout

ORDINARY = (Tensor, Parameter)  # a DTensor that is a parameter has another type
_LOCAL, _PLACEMENTS = attrgetter("_local_tensor"), attrgetter("_spec.placements")
_DTYPE, _DEVICE, _IS_CPU = attrgetter("dtype"), attrgetter("device"), attrgetter("is_cpu")


def first_of_each_kind(tensors: Sequence[Tensor]) -> Iterable[int]:
    """The indices of the tensors that stand for all: of those that fill one stretch of memory in the usual order the
    first of each dtype and device, and all others.
    """
    if not {*ORDINARY}.issuperset(map(type, tensors)):
        return range(len(tensors))
    alike = len(set(map(_DTYPE, tensors))) == 1 and all(map(Tensor.is_contiguous, tensors))
    if alike and (all(map(_IS_CPU, tensors)) or len(set(map(_DEVICE, tensors))) == 1):
        return (0,)
    kinds = list(zip(map(_DTYPE, tensors), map(_DEVICE, tensors), map(Tensor.is_contiguous, tensors), strict=True))
    first = dict(zip(reversed(kinds), range(len(kinds) - 1, -1, -1), strict=True))
    return [i for i, kind in enumerate(kinds) if not kind[2] or first[kind] == i]


def first_of_each_dtype(tensors: Sequence[Tensor]) -> Iterable[int]:
    """The index of the first tensor of each dtype."""
    dtypes = list(map(_DTYPE, tensors))
    return sorted(map(dtypes.index, set(dtypes)))


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor. One can only exist once its module is imported, which costs a second."""
    if type(tensor) in ORDINARY:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def mesh_of(tensor: Tensor) -> Any:
    """The mesh of a DTensor; None of another."""
    return tensor.device_mesh if is_sharded(tensor) else None  # type: ignore[attr-defined]


def is_flattened(p: Any) -> bool:
    """Whether FullyShardedDataParallel has made `p` of a parameter, or a part of it: an ordinary tensor of its own."""
    return bool(getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False))


def split_over(tensor: Tensor) -> list[int]:
    """The dimensions of a DTensor's mesh over which its elements are split: of any kind of shard, as the strided ones
    that tensor parallel and FSDP make together say that they are none.
    """
    own: Any = tensor
    return [dim for dim, kind in enumerate(own.placements) if not (kind.is_replicate() or kind.is_partial())]


def added_up(x: Tensor, mesh: Any, dims: Iterable[int]) -> Tensor:
    """The sum of a tensor of each rank over some dimensions of a mesh, which are the same on all of these ranks."""
    total = x.to(mesh.device_type)  # sums of what is stepped on the host are there
    for dim in dims:
        torch.distributed.all_reduce(total, group=mesh.get_group(dim))
    return total.to(x.device)


def parts_of(tensor: Tensor, coordinates: Sequence[tuple[int, ...]]) -> tuple[list[tuple[Any, ...]], list[Any]]:
    """What the whole of a DTensor is indexed with to get the parts at some places of its mesh, and their shapes."""
    own: Any = tensor
    sizes = own.device_mesh.shape
    found = [_part(tuple(own.shape), own.placements, sizes, at) for at in coordinates]
    return [indices for indices, _ in found], [shape for _, shape in found]


@lru_cache(maxsize=1 << 12)
def _part(
    shape: tuple[int, ...], placements: tuple[Any, ...], sizes: tuple[int, ...], at: tuple[int, ...]
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Of one part: slices where its elements follow each other, else index tensors."""
    each = []
    for dim, size in enumerate(shape):
        indices = torch.arange(size, device="cpu").view([1] * dim + [-1] + [1] * (len(shape) - dim - 1))
        for kind, ranks, place in zip(placements, sizes, at, strict=True):
            if getattr(kind, "dim", None) in (dim, dim - len(shape)):
                indices = kind._split_tensor(indices, ranks, with_padding=False, contiguous=False)[0][place]
        each.append(indices)
    own_shape = tuple(map(torch.numel, each))
    starts = [int(indices.reshape(-1)[0]) if n else 0 for indices, n in zip(each, own_shape, strict=True)]
    if all(
        n == 0 or int(indices.max()) - start == n - 1 for indices, n, start in zip(each, own_shape, starts, strict=True)
    ):
        return tuple(slice(start, start + n) for start, n in zip(starts, own_shape, strict=True)), own_shape
    return tuple(each), own_shape


def local(tensor: Tensor) -> Tensor:
    """The part of `tensor` on this process, outside autograd and DTensor dispatch; an ordinary tensor is its own."""
    if type(tensor) in ORDINARY:
        return tensor
    shard: Any = getattr(tensor, "_local_tensor", tensor)
    own: Tensor = shard.wait() if hasattr(shard, "wait") else shard
    return own


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """:func:`local` of DTensors, quickly; not of those that are still on their way, which stay what they are."""
    return list(map(_LOCAL, tensors))


def with_local(tensor: Tensor, shard: Tensor) -> Tensor:
    """`tensor` with `shard` as its local part."""
    if not is_sharded(tensor):
        return shard
    from torch.distributed.tensor import DTensor

    own: Any = tensor
    if shard.device.type != own.device_mesh.device_type:  # where from_local would move it
        moved: Any = torch.empty_like(own.detach(), dtype=shard.dtype, device=shard.device)
        moved._local_tensor = shard
        return cast(Tensor, moved)
    return DTensor.from_local(
        shard, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, on every rank; an ordinary tensor is its own."""
    own: Any = tensor
    return cast(Tensor, own.full_tensor()) if is_sharded(tensor) else tensor


def placed_as(p: Tensor, whole: Tensor) -> Tensor:
    """A tensor that every rank has whole, placed as `p`; nothing is communicated."""
    if not is_sharded(p):
        return whole
    from torch.distributed.tensor import distribute_tensor

    own: Any = p
    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)


def local_gradients(params: Sequence[Tensor], gradients: list[Tensor | None], placements: list[Any]) -> Any:
    """:func:`local_gradient` of every gradient that there is, quickly where all are placed as their parameters.

    Args:
        placements: of the parameters; None of an ordinary one.
    """
    try:
        if list(map(_PLACEMENTS, gradients)) == placements:
            own = locals_of(gradients)  # type: ignore[arg-type]
            if not any(hasattr(kind, "wait") for kind in set(map(type, own))):
                return own
    except AttributeError:  # one is None, or an ordinary tensor
        pass
    pairs = zip(params, gradients, strict=True)
    return [g if g is None else local_gradient(p, g) for p, g in pairs]


def placements_of(tensor: Tensor) -> Any:
    """How a DTensor is placed; None of another."""
    return tensor.placements if is_sharded(tensor) else None  # type: ignore[attr-defined]


def local_gradient(p: Tensor, g: Tensor) -> Tensor:
    """The local part of `g`, placed as its parameter (a gradient may still be a partial sum, or whole)."""
    if is_sharded(p) != is_sharded(g):
        kinds = ["an ordinary tensor", "a DTensor"]
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} is {kinds[is_sharded(p)]} and its gradient {kinds[is_sharded(g)]}. "
            "Assign a gradient of the parameter's own kind."
        )
    if not is_sharded(p):
        return g
    if g.placements != p.placements:  # type: ignore[attr-defined]
        g = g.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return local(g)


def has_memory(tensor: Tensor) -> bool:
    """Whether the elements lie at an address. Those of a wrapper subclass and of a meta tensor do not."""
    return tensor.data_ptr() != 0


def made_in_inference_mode(tensor: Tensor) -> bool:
    """Whether a tensor may be written in inference mode only. One that was given the memory of an ordinary tensor, by
    ``tensor.data``, says that it is ordinary, and counts no writes all the same.
    """
    try:
        return tensor.is_inference() or tensor._version < 0
    except RuntimeError:
        return True


def ordinary(tensor: Tensor) -> Tensor:
    """An ordinary tensor of these values: of what torch computed from wrapper subclasses, which is one."""
    if not is_wrapper(tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def strides(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """(size, stride) a dimension, without dimensions of size 1: equal for equal memory layouts."""
    return tuple((n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether `tensor` (a local part) is of a class that does what operations do itself: its elements may lie anywhere,
    and ``data_ptr()`` may be 0.
    """
    kind: Any = type(tensor)
    return kind not in ORDINARY and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def layout(tensor: Tensor) -> Layout:
    """Whether the elements fill one stretch of memory, leave gaps, or lie on top of each other; those of a wrapper may
    lie anywhere.
    """
    if is_wrapper(tensor):
        return "wrapper"
    if tensor.is_contiguous() or tensor.numel() < 2:
        return "dense"
    span, gaps = 1, False
    for size, stride in sorted(strides(tensor), key=lambda pair: pair[1]):
        if stride < span:
            return "overlapping"
        gaps |= stride > span
        span += stride * (size - 1)
    return "strided" if gaps else "dense"


def extent(tensor: Tensor) -> tuple[int, int]:
    """First address and one past the last that `tensor` can touch."""
    start = tensor.data_ptr()
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + elements * tensor.element_size()


def overlapping(tensors: Sequence[Tensor]) -> set[int]:
    """Indices of the tensors that share memory with another one of the list."""
    found = set()
    reach = (0, -1)  # the furthest end so far and whose it is
    real = (i for i, t in enumerate(tensors) if not is_lazy(t) and t.numel() and has_memory(t))
    for start, end, i in sorted((*extent(tensors[i]), i) for i in real):
        if start < reach[0]:
            found |= {i, reach[1]}
        if end > reach[0]:
            reach = (end, i)
    return found


def same_layout(tensor: Tensor, p: Tensor) -> bool:
    """Whether two tensors lie alike in memory."""
    return tensor.stride() == p.stride() or strides(tensor) == strides(p)


def in_layout_of(p: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` itself where it lies in memory as `p` does, else a copy that does."""
    if same_layout(tensor, p):
        return tensor
    laid_out = torch.empty_like(p, dtype=tensor.dtype, device=tensor.device, memory_format=torch.preserve_format)
    return laid_out.copy_(tensor)


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor as one dimension, in the order of memory, outside autograd."""
    tensor = tensor.detach()
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def samples(tensors: Iterable[Tensor], every: int) -> Tensor:
    """Of each tensor, flattened, the first element and every few after it, one tensor after the other: a new one. Both
    parts of a complex number are elements.
    """
    real = (torch.view_as_real(t) if t.is_complex() else t for t in tensors)
    return torch.cat([t.reshape(-1)[::every] for t in real])


def numbers_in_memory(tensor: Tensor) -> Tensor:
    """The number of each element, counted as they lie in memory."""
    numbers = torch.arange(tensor.numel(), device=tensor.device)
    dense = layout(tensor) == "dense"
    return numbers.as_strided(tensor.shape, tensor.stride()) if dense else numbers.view(tensor.shape)


def all_aligned(pointers: Iterable[int]) -> bool:
    """Whether every address is a multiple of 16 bytes, what a 128-bit access needs."""
    bits = 0
    for pointer in pointers:
        bits |= pointer
    return bits % 16 == 0
