"""What several kernels are given alike: dtypes, and the chunks that their programs take."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...kernels import multi_tensor as kernel
from ...precision.codecs import Codec, plain

TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}


def kept_as(
    codecs: tuple[Codec, ...],
    gradient: torch.dtype,
    warp_size: int,
    module: ModuleType = kernel,
    averaged: bool = False,
) -> dict[str, Any]:
    """What the kernel is told of how the roles are kept, and the launch options that follow.

    Args:
        codecs: of the parameter and the states.
        gradient: its dtype.
        warp_size: threads a warp.
        module: of the kernel.
        averaged: whether the last role is the average of the parameter.
    """
    roles = [codecs[0], plain(gradient), *codecs[1:]]
    parts = [part for codec in roles for part in codec.parts]
    block_size = max(codec.block_size for codec in codecs)
    return {
        "CODECS": tuple(codec.name for codec in roles),
        "DTYPES": tuple(TRITON_DTYPES[dtype] for dtype, _ in parts),
        "PER_ITEM": tuple(per_item for _, per_item in parts),
        "FIRST": (0, *accumulate(len(codec.dtypes) for codec in roles)),
        "AVERAGED": averaged,
        "RANDOM": any(codec.random for codec in codecs),
        "BLOCK_SIZE": block_size,
        **module.launch_options([dtype.itemsize for dtype, per_item in parts if per_item == 1], block_size, warp_size),
    }


def chunk_table(numels: Sequence[int], device: torch.device) -> Tensor:
    """int32 ``(chunks, 2)``: the tensor and the chunk in it, of tensors of so many elements."""
    chunks = -(-torch.tensor(numels, dtype=torch.int64, device="cpu") // kernel.BLOCK)
    tensor = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), chunks)
    first = torch.repeat_interleave(chunks.cumsum(0) - chunks, chunks)
    chunk = torch.arange(len(tensor), device="cpu") - first
    return torch.stack((tensor, chunk), dim=1).to(torch.int32).to(device)
