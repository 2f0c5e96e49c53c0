"""What random bits depend on: the seed, the number of the update, the parameter and the element. They are hashes of
these, so that they are the same on every backend, on every replica and shard, and after a resume.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels import codecs
from ..kernels.language import torch_form
from ..util.layout import is_sharded, numbers_in_memory, split_over
from ..util.on_device import half

_hashed, _row_key, _tensor_key = map(torch_form, (codecs.hashed, codecs.row_key, codecs.tensor_key))


def row_key(seed: int | list[Tensor], step: Any, device: torch.device) -> Tensor:
    """A hash of seed and step, 0-dim int32. A step on a device stays there, and so does a seed: two halves, int32."""
    # Filled there, not copied: that would be waited for, and could not be captured.
    halves = seed
    if isinstance(halves, int):
        halves = [torch.full((), half(part), dtype=torch.int32, device=device) for part in (halves, halves >> 32)]
    count = step.to(device, torch.int32) if isinstance(step, Tensor) else half(step)
    key: Tensor = _row_key(halves[0], halves[1], count)
    return key


def host_row_key(seed: int, step: int) -> int:
    """:func:`row_key` of numbers that the host knows: a signed 32-bit int."""
    key = 0
    for part in (seed, seed >> 32, step):
        key = (key + part) & 0xFFFFFFFF
        key = (key ^ (key >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        key = (key ^ (key >> 15)) * 0x846CA68B & 0xFFFFFFFF
        key ^= key >> 16
    return half(key)


def tensor_keys(rows: Tensor, numbers: Tensor, first: Tensor) -> Tensor:
    """What the kernels take, int32 ``(tensors, 4)``: the index of a tensor's first element in the whole parameter, its
    lower and its upper half, and two hashes.

    Args:
        rows: int32, the key of each tensor's row.
        numbers: int32, each parameter's index among the optimizer's.
        first: int64, that index.
    """
    return torch.stack((_low(first), _low(first >> 32), *_tensor_key(rows, numbers)), dim=1)


def tensor_numbers(first: Tensor, numbers: Tensor) -> Tensor:
    """What a kernel that forms the keys itself takes, int32 ``(tensors, 3)``: the halves of that index, the place.

    Args:
        first, numbers: as of :func:`tensor_keys`.
    """
    return torch.stack((_low(first), _low(first >> 32), numbers), dim=1)


def first_index(p: Tensor) -> int:
    """The index that random bits give the first element of this process's shard; those of the others follow.

    Where the parameter is cut along its rows it is the index in the whole parameter, so that shards have the bits of
    the whole. Otherwise the shards are counted, as if each was as large as the largest: no two elements have the same
    bits, and replicas have those of each other.
    """
    if not is_sharded(p):
        return 0
    from torch.distributed.tensor import Shard

    own: Any = p
    split = split_over(p)
    sizes = [own.device_mesh.size(dim) for dim in split]
    places = [own.device_mesh.get_local_rank(dim) for dim in split]
    cut = [own.placements[dim].dim for dim in split]
    if all(type(own.placements[dim]) is Shard and own.placements[dim].dim == 0 for dim in split):
        first, rows = 0, int(own.shape[0]) if own.dim() else 1
        for size, place in zip(sizes, places, strict=True):
            each = -(-rows // size)  # as torch.chunk
            before = min(each * place, rows)
            first, rows = first + before, min(each, rows - before)
        return first * (own.numel() // max(own.shape[0], 1) if own.dim() else 1)
    largest: list[int] = list(own.shape)
    shard: int = 0
    for size, place, dim in zip(sizes, places, cut, strict=True):
        largest[dim] = -(-largest[dim] // size)
        shard = shard * size + place
    return shard * math.prod(largest)


def bits_of_elements(key: Tensor, index: Tensor) -> Tensor:
    """32 random bits an element, int32, as the kernels make them.

    Args:
        key: int32 ``(4,)``, a row of :func:`tensor_keys`.
        index: the number of each element in the tensor's memory; int32 where no index of the whole parameter there
            has another upper half than the first, else int64.
    """
    low, high, first, second = key.unbind()
    if index.dtype == torch.int64:
        index = index + (low.long() & 0xFFFFFFFF)
        bits: Tensor = _hashed(_low(index), high + _low(index >> 32), first, second)
    else:
        bits = _hashed(index + low, high, first, second)
    return bits


def bits_of_parameter(p: Tensor, index: int, seed: int, count: Any, like: Tensor) -> Tensor:
    """32 random bits an element of a tensor that lies as a parameter does.

    Args:
        index: of the parameter among the optimizer's.
        count: number of the update; a number, or a tensor on any device.
        like: that tensor, on this process.
    """
    device = like.device
    key = row_key(seed, count if isinstance(count, Tensor) else int(count), device)
    number = torch.full((1,), index, dtype=torch.int32, device=device)
    first = torch.full((1,), first_index(p), device=device)
    return bits_of_elements(tensor_keys(key.view(1), number, first)[0], numbers_in_memory(like))


def _low(x: Tensor) -> Tensor:
    """The lower 32 bits of int64."""
    return ((x << 32) >> 32).to(torch.int32)
