"""What several kernels are given alike: dtypes, and the chunks that their programs take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from ...kernels import multi_tensor as kernel

TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}


def chunk_table(numels: Sequence[int], device: torch.device) -> Tensor:
    """int32 ``(chunks, 2)``: the tensor and the chunk in it, of tensors of so many elements."""
    chunks = -(-torch.tensor(numels, dtype=torch.int64, device="cpu") // kernel.BLOCK)
    tensor = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), chunks)
    first = torch.repeat_interleave(chunks.cumsum(0) - chunks, chunks)
    chunk = torch.arange(len(tensor), device="cpu") - first
    return torch.stack((tensor, chunk), dim=1).to(torch.int32).to(device)
