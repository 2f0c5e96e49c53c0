"""The norm pass by Triton: one launch for the gradients of one device and dtype."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...buckets.gradient_norm import Norm
from ...kernels import gradient_norm as kernels
from ...util.layout import all_aligned
from .launch import Launcher, warp_size
from .staging import Staging
from .tables import TRITON_DTYPES, chunk_table

# The chunk and tensor tables of the lists of tensors that were last asked for, by device and sizes, and the table of
# their addresses.
_TABLES: OrderedDict[Any, tuple[Tensor, Tensor, Staging]] = OrderedDict()
_KEPT = 8


def partial_norms(tensors: Sequence[Tensor], norm: Norm) -> Tensor:
    """See norms.partial_norms; tensors of one device and dtype."""
    device, numels = tensors[0].device, tuple(t.numel() for t in tensors)
    key = (device, numels)
    if key not in _TABLES:
        sizes = torch.tensor([[n, 0] for n in numels], device="cpu").to(device)
        _TABLES[key] = (chunk_table(numels, device), sizes, Staging(len(numels), torch.int64, device))
        if len(_TABLES) > _KEPT:
            _TABLES.popitem(last=False)
    _TABLES.move_to_end(key)
    pointers = [t.data_ptr() for t in tensors]
    chunks, sizes, gradients = _TABLES[key]
    gradients.push(array("q", pointers))
    return NormPass(chunks, sizes, tensors[0].dtype, all_aligned(pointers), norm)(gradients.tensor)


class NormPass:
    """The pass over the gradients of some tensors.

    Args:
        chunks, tensors: tables, as of the kernel.
        dtype: of the gradients.
        aligned: whether all of their addresses are multiples of 16.
        norm: which.
    """

    def __init__(self, chunks: Tensor, tensors: Tensor, dtype: torch.dtype, aligned: bool, norm: Norm) -> None:
        device, count = chunks.device, len(chunks)
        self._programs = -(-count // kernels.CHUNKS)
        self._launch = norm_launcher(dtype, norm.kind, aligned, device)
        self._sums = torch.empty(self._programs, 2, dtype=torch.float64, device=device)
        self._held = (chunks, tensors)
        self._tables = self._launch.fixed(chunks, tensors)
        self._rest = self._launch.fixed(self._sums, count, tensors.shape[1], power_of(device, norm))

    def __call__(self, gradients: Tensor) -> Tensor:
        """The sums, ``(programs, 2)``, in memory that the next pass writes anew.

        Args:
            gradients: a table, as of the kernel.
        """
        if self._programs:
            self._launch(self._programs, *self._tables, gradients, *self._rest)
        return self._sums


@cache
def norm_launcher(dtype: torch.dtype, kind: str, aligned: bool, device: torch.device) -> Launcher:
    """What starts the pass over gradients of a dtype."""
    wide = dtype == torch.float64 or kind == "p"
    constants = {
        "KIND": kind,
        "DTYPE": TRITON_DTYPES[dtype],
        "COMPUTE": TRITON_DTYPES[torch.float64 if wide else torch.float32],
        "ALIGNED": aligned,
        **kernels.launch_options(dtype.itemsize, warp_size(device)),
    }
    types = (torch.int32, torch.int64, torch.int64, torch.float64, 2, 2, torch.float64)
    return Launcher(kernels.partial_norms, types, constants, device)


@cache
def power_of(device: torch.device, norm: Norm) -> Tensor:
    """The power of a norm on the device."""
    return torch.full((1,), norm.power, dtype=torch.float64, device=device)
