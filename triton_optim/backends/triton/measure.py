"""The pass over many tensors that sums up what a measure makes of their elements: two launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...buckets.key import Key
from ...kernels import measure as kernels
from ...kernels import multi_tensor
from ...kernels.language import python_function
from ...precision.codecs import Codec
from .launch import Launcher, warp_size
from .tables import TRITON_DTYPES, kept_as


class MeasurePass:
    """The sums of a variant's measure over the parameters of a bucket.

    Args:
        key: the bucket's.
        chunks, tensors: its tables.
        numels: elements of each parameter.
    """

    def __init__(self, key: Key, chunks: Tensor, tensors: Tensor, numels: Sequence[int]) -> None:
        self._key, self._tables, self._count = key, (chunks, tensors), len(numels)
        counts = -(-torch.tensor([0, *numels], dtype=torch.int64, device="cpu") // multi_tensor.BLOCK)
        self._first = counts.cumsum(0).to(key.device)
        sums = python_function(key.variant.measure).returned
        self._launchers: dict[Any, list[Launcher]] = {}  # by the type of the scalars
        self._chunk_sums = torch.empty(len(chunks), sums, dtype=torch.float64, device=key.device)

    def __call__(self, scalars: Any, gradients: Tensor, rows: Tensor) -> Tensor:
        """The sums, ``(parameters, sums)``.

        Args:
            scalars: the NamedTuple type of the scalars.
            gradients, rows: tables, as of the kernel; a row for each parameter.
        """
        if scalars not in self._launchers:
            self._launchers[scalars] = measure_launchers(self._key, scalars)
        measure, add_up = self._launchers[scalars]
        sums = torch.empty(self._count, self._chunk_sums.shape[1], dtype=torch.float64, device=self._key.device)
        measure(len(self._chunk_sums), *self._tables, gradients, rows, self._chunk_sums)
        add_up(self._count, self._chunk_sums, self._first, sums)
        return sums


def measure_launchers(key: Key, scalars: Any) -> list[Launcher]:
    """What starts the two kernels.

    Args:
        scalars: the NamedTuple type of the scalars.
    """
    variant, threads = key.variant, warp_size(key.device)
    read = key.codecs[: len(key.codecs) - variant.averaged]
    constants = measure_constants(variant.measure, scalars, read, key.gradient, key.compute, threads)
    # The tables are those of the update, which have the average, too.
    constants["COLUMNS"] += sum(len(codec.dtypes) for codec in key.codecs[len(read) :])
    constants["WIDTH"] += variant.averaged
    constants |= {"ALIGNED": key.aligned, "SOURCE": getattr(variant.measure, "cache_key", "")}
    types = (torch.int32, torch.int64, torch.int64, key.compute, torch.float64)
    options = {"num_warps": kernels.THREADS // threads, "enable_fp_fusion": True}
    add_up = {"SUMS": constants["SUMS"], "BLOCK": kernels.TOGETHER, **options}
    return [
        Launcher(kernels.measure, types, constants, key.device),
        Launcher(kernels.sum_chunks, (torch.float64, torch.int64, torch.float64), add_up, key.device),
    ]


def measure_constants(
    measure: Any, scalars: Any, codecs: tuple[Codec, ...], gradient: torch.dtype, compute: torch.dtype, threads: int
) -> dict[str, Any]:
    """What the first kernel is compiled for, and its launch options, where nothing else is in the tables.

    Args:
        measure: of a variant.
        scalars: the NamedTuple type of the scalars.
        codecs: of the parameter and the states.
        gradient, compute: the dtypes of the gradient and of the arithmetic.
        threads: of a warp.
    """
    kept = kept_as(codecs, gradient, threads)
    return {
        "RULE": measure,
        "SCALARS": tl.constexpr(scalars),
        "FIELDS": scalars._fields,
        "SUMS": python_function(measure).returned,
        "COLUMNS": multi_tensor.FIRST_ADDRESS + sum(len(codec.dtypes) for codec in codecs),
        "WIDTH": 1 + len(scalars._fields),
        "COMPUTE": TRITON_DTYPES[compute],
        "BLOCK": multi_tensor.BLOCK,
        **{name: value for name, value in kept.items() if name not in ("AVERAGED", "RANDOM")},
    }
