"""The norm pass by Triton: a launch for the gradients of one device and dtype, and one for what becomes of all sums."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .gradient_norm import EUCLIDEAN, Norm, Scaling
from .kernels import gradient_norm as kernels
from .layout import all_aligned
from .rows import to_device
from .triton_backend import TRITON_DTYPES, chunk_table
from .triton_launch import launch, warp_size

# The chunk and tensor tables of the lists of tensors that were last asked for, by device and sizes.
_TABLES: OrderedDict[Any, tuple[Tensor, Tensor]] = OrderedDict()
_KEPT = 8

THREADS = 256  # a program of the second launch


def partial_norms(tensors: Sequence[Tensor], norm: Norm) -> Tensor:
    """See gradient_norm.partial_norms; tensors of one device and dtype."""
    device, numels = tensors[0].device, tuple(t.numel() for t in tensors)
    key = (device, numels)
    if key not in _TABLES:
        _TABLES[key] = (chunk_table(numels, device), torch.tensor([[n, 0] for n in numels]).to(device))
        if len(_TABLES) > _KEPT:
            _TABLES.popitem(last=False)
    _TABLES.move_to_end(key)
    pointers = [t.data_ptr() for t in tensors]
    chunks, sizes = _TABLES[key]
    gradients = to_device(array("q", pointers), torch.int64, device)
    return launch_partial_norms(chunks, sizes, gradients, tensors[0].dtype, all_aligned(pointers), norm)


def launch_partial_norms(
    chunks: Tensor, tensors: Tensor, gradients: Tensor, dtype: torch.dtype, aligned: bool, norm: Norm
) -> Tensor:
    """The sums of a launch, ``(programs, 2)``.

    Args:
        chunks, tensors, gradients: tables, as of the kernel.
    """
    device = chunks.device
    programs = -(-len(chunks) // kernels.CHUNKS)
    out = torch.empty(programs, 2, dtype=torch.float64, device=device)
    wide = dtype == torch.float64 or norm.kind == "p"
    constants = {
        "KIND": norm.kind,
        "DTYPE": TRITON_DTYPES[dtype],
        "COMPUTE": TRITON_DTYPES[torch.float64 if wide else torch.float32],
        "ALIGNED": aligned,
        **kernels.launch_options(dtype.itemsize, warp_size(device)),
    }
    if programs:
        arguments = (chunks, tensors, gradients, out, len(chunks), tensors.shape[1], power_of(device, norm))
        launch(kernels.partial_norms, programs, arguments, constants)
    return out


def step_signal(partials: Tensor | None, scaling: Scaling, max_norm: Tensor) -> Tensor:
    """See gradient_norm.signal_from: in one launch.

    Args:
        max_norm: the largest norm allowed, infinite for any, float64 ``(1,)`` on the device.
    """
    device = max_norm.device
    out = torch.empty(4, dtype=torch.float64, device=device)
    scale, found = (placed(t, device) for t in (scaling.grad_scale, scaling.found_inf))
    sums = out if partials is None else partials
    count = 0 if partials is None else len(partials)
    arguments = (sums, count, max_norm, out if scale is None else scale, out if found is None else found, out)
    constants = {
        "KIND": "none" if partials is None else EUCLIDEAN.kind,
        "SCALED": scale is not None,
        "FOUND": found is not None,
        "SKIP": scaling.look and found is None,
        "BLOCK": 4 * THREADS,
        "num_warps": THREADS // warp_size(device),
        "enable_fp_fusion": True,
    }
    launch(kernels.step_signal, 1, arguments, constants)
    return out


def placed(value: Tensor | None, device: torch.device) -> Tensor | None:
    """A 1-element tensor as the kernel reads it."""
    return None if value is None else value.detach().to(device, torch.float32, non_blocking=True)


@cache
def power_of(device: torch.device, norm: Norm) -> Tensor:
    """The power of a norm on the device."""
    return to_device(array("d", [norm.power]), torch.float64, device)
