"""Vector code that torch's compiler has no good words for on a CPU. It reinterprets bits in memory, an element at a
time; counts from a number by inserting each element; rounds to bfloat16 what is one already; and where half a vector is
updated in place masks the rest, so that each load waits for the store before it. Stochastic rounding takes three times
as long so.

Inductor's own words stay for whatever else is compiled, in this thread and in others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch

_own = threading.local()


@contextmanager
def vector_code() -> Iterator[None]:
    """What is compiled inside is written so. Every value that it converts to bfloat16 must be a bfloat16 number."""
    _install()
    _own.words = True
    try:
        yield
    finally:
        _own.words = False


@cache
def _install() -> None:
    """Put our words before Inductor's. One that has other places for them keeps its own."""
    from torch._inductor.codegen import cpp

    words, kernel = getattr(cpp, "CppVecOverrides", None), getattr(cpp, "CppVecKernel", None)
    if hasattr(kernel, "_get_vec_type") and hasattr(words, "to_dtype_bitcast"):
        words.to_dtype_bitcast = staticmethod(_or_before(_reinterpreted, words.to_dtype_bitcast))  # type: ignore[union-attr]
        own: dict[str, Callable[..., Any]] = {
            "arange": _counted,
            "get_to_dtype_expr": _narrowed,
            "_get_vec_load_line": _half_loaded,
            "_get_store_line": _half_stored,
        }
        for name, word in own.items():
            if hasattr(kernel, name):
                setattr(kernel, name, _or_before(word, getattr(kernel, name)))


def _or_before(word: Callable[..., Any], before: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor's `before` where `word` has nothing to say."""

    @wraps(before)
    def either(*arguments: Any, **options: Any) -> Any:
        own = word(*arguments, **options) if getattr(_own, "words", False) else None
        return before(*arguments, **options) if own is None else own

    return either


def _reinterpreted(x: Any, dtype: torch.dtype, src_dtype: torch.dtype) -> str | None:
    from torch._inductor.virtualized import V

    if dtype.itemsize != src_dtype.itemsize:
        return None
    kernel: Any = V.kernel
    kind = kernel._get_vec_type(dtype)
    return f"[&]() {{ {kind} same; std::memcpy(&same, &{x}, sizeof(same)); return same; }}()"


def _counted(kernel: Any, index: Any, stride: Any) -> Any:
    """From 0 in a constant; the number is added."""
    if index.dtype != torch.int32 or stride != 1 or str(index) == "0":
        return None
    kind = kernel._get_vec_type(index.dtype)
    made = kernel.cse.generate(kernel.compute, f"({kind}::arange(0, 1) + {kind}({index}))")
    made.dtype, made.is_vec = index.dtype, True
    return made


def _narrowed(kernel: Any, src: Any, dtype: torch.dtype, src_dtype: torch.dtype, rounding: bool = False) -> str | None:
    """The upper halves of float32 numbers."""
    if (src_dtype, dtype) != (torch.float32, torch.bfloat16) or not src.is_vec:
        return None
    kind = kernel._get_vec_type(dtype)
    if _half_vectors(kernel, dtype):
        upper = f"_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512({src}), 16))"
        return f"{kind}(_mm512_castsi256_si512({upper}))"
    if kernel._get_num_vectors(src_dtype) != 2 * kernel._get_num_vectors(dtype):
        return None
    return (
        f"[&]() {{ typedef uint32_t wide_t __attribute__((vector_size(sizeof({src})))); "
        f"typedef uint16_t half_t __attribute__((vector_size(sizeof({kind})))); "
        f"wide_t wide; std::memcpy(&wide, &{src}, sizeof(wide)); "
        "half_t half = __builtin_convertvector(wide >> 16, half_t); "
        f"{kind} out; std::memcpy(&out, &half, sizeof(out)); return out; }}()"
    )


def _half_loaded(kernel: Any, var: str, index: Any, dtype: torch.dtype, load_mask: Any = None) -> str | None:
    if load_mask or not _half_vectors(kernel, dtype):
        return None
    half = f"_mm256_loadu_si256(reinterpret_cast<const __m256i*>({_place(var, index)}))"
    return f"{kernel._get_vec_type(dtype)}(_mm512_castsi256_si512({half}))"


def _half_stored(
    kernel: Any, value: Any, var: str, index: Any, dtype: torch.dtype, accu_store: bool = False
) -> Any | None:
    from torch._inductor import utils

    stride = kernel._try_get_const_stride(index, kernel.itervars[kernel.tiling_idx])
    if accu_store or stride != 1 or not _half_vectors(kernel, dtype):
        return None
    names: Any = utils  # from torch 2.14 on it only imports the class, from a module that 2.13 has not
    code = names.IndentedBuffer()
    place = f"reinterpret_cast<__m256i*>({_place(var, index)})"
    code.writeline(f"_mm256_storeu_si256({place}, _mm512_castsi512_si256({value}));")
    return code


def _place(var: str, index: Any) -> str:
    from torch._inductor.codegen import cpp_utils

    words: Any = cpp_utils
    return f"{var} + {words.cexpr_index(index)}"


def _half_vectors(kernel: Any, dtype: torch.dtype) -> bool:
    """Whether 16 elements of 16 bits are taken at a time, in vectors of 512."""
    from torch._inductor import cpu_vec_isa

    wide = isinstance(cpu_vec_isa.pick_vec_isa(), cpu_vec_isa.VecAVX512)
    half = dtype in (torch.bfloat16, torch.float16) and kernel.tiling_factor == 16
    return wide and half and kernel.tail_size is None
