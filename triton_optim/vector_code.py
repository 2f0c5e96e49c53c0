"""Vector code that torch's compiler has no good words for on a CPU. It reinterprets bits in memory, an element at a
time; counts from a number by inserting each element; and rounds to bfloat16 what is one already. Stochastic rounding
takes three times as long so.

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
        for name, word in (("arange", _counted), ("get_to_dtype_expr", _narrowed)):
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
    count = kernel.tiling_factor
    return (
        f"[&]() {{ typedef uint32_t wide_t __attribute__((vector_size({4 * count}))); "
        f"typedef uint16_t half_t __attribute__((vector_size({2 * count}))); "
        f"wide_t wide; std::memcpy(&wide, &{src}, sizeof(wide)); "
        "half_t half = __builtin_convertvector(wide >> 16, half_t); "
        f"{kernel._get_vec_type(dtype)} out; std::memcpy(&out, &half, sizeof(half)); return out; }}()"
    )
