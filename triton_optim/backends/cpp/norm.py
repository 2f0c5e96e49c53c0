"""The norm pass in C++: a sum for each chunk of the gradients of one dtype, in one call."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...buckets.gradient_norm import Norm, eager_partial_norms
from ...util.cpp_build import library
from .chunks import Chunks
from .source import header, storage

KINDS = {"1": "SUM", "2": "SQUARES", "inf": "LARGEST"}
_TYPES = {torch.float64: "double", torch.float32: "float", torch.bfloat16: "Bfloat16", torch.float16: "Float16"}


@cache
def sums_of(kind: str, dtype: torch.dtype) -> Any:
    """The compiled sums, one for a process; see kernels/cpp/gradient_norm.h."""
    text = f"""
extern "C" void sums(int64_t works, const int64_t *first, const int64_t *chunks, const int64_t *gradients, double *out,
                     int64_t threads) {{
    norms<{KINDS[kind]}, {_TYPES[dtype]}>(works, first, chunks, gradients, out, threads);
}}
"""
    sums = library(storage([dtype]) + header("chunks.h") + header("gradient_norm.h") + text).sums
    sums.argtypes, sums.restype = [c_int64, *[c_void_p] * 4, c_int64], None
    return sums


def chunk_sums(chunks: Chunks, addresses: array[int], dtype: torch.dtype, norm: Norm) -> Tensor:
    """What norms.partial_norms returns, for tensors of which the addresses are given; 0 for none."""
    out = torch.zeros(max(len(chunks), 1), 2, dtype=torch.float64, device="cpu")
    call = sums_of(norm.kind, dtype)
    call(*chunks.arguments(), addresses.buffer_info()[0], out.data_ptr(), chunks.threads())
    return out


def partial_norms(tensors: Sequence[Tensor], norm: Norm) -> Tensor:
    """See norms.partial_norms; dense tensors of one dtype on the CPU."""
    if norm.kind not in KINDS:
        return eager_partial_norms(tensors, norm)
    addresses = array("q", [t.data_ptr() for t in tensors])
    return chunk_sums(Chunks([t.numel() for t in tensors]), addresses, tensors[0].dtype, norm)
