"""Second moments that are kept as the means of their rows and columns, of many parameters together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec import State
from ..util.in_place import write_each
from ..util.layout import is_sharded
from .shards import Shards

ONE_BY_ONE = ("cpu",)
Tensors = tuple[Tensor, ...] | list[Tensor]


def by_portions(
    prologue: Callable[..., list[Tensor]],
    group: dict[str, Any],
    h: Any,
    params: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Any]],
) -> list[Tensor]:
    """What a prologue makes of those that are updated together: few launches for all; a CPU has none to save, and one
    at a time they stay in its caches. Of sharded ones all, as ranks add up their sums together.
    """
    at_once = 1 if params[0].device.type in ONE_BY_ONE and not is_sharded(params[0]) else len(params)
    portions = (slice(start, start + at_once) for start in range(0, len(params), at_once))
    return [x for own in portions for x in prologue(group, h, params[own], gradients[own], states[own])]


def in_place(function: Any, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    """The function of `x`, in its memory where autograd does not need that."""
    result: Tensor = function(x, *arguments, **keywords, out=None if torch.is_grad_enabled() else x)
    return result


def averaged(states: list[Tensor], news: Tensors, weight: Any) -> tuple[Tensor, ...]:
    """The states moved towards the new ones, in the dtype of these; they are kept in their own.

    Args:
        weight: of the new ones; a number, or a 0-dim tensor.
    """
    averages = lerped(states, news, weight)
    write_each(states, averages)
    return averages


def lerped(states: list[Tensor], news: Tensors, weight: Any) -> tuple[Tensor, ...]:
    """What :func:`averaged` keeps and returns; nothing is written."""
    held = [state.to(new.dtype) for state, new in zip(states, news, strict=True)]
    if isinstance(weight, Tensor):
        return tuple(x.lerp(new, weight.to(new)) for x, new in zip(held, news, strict=True))
    return torch._foreach_lerp(held, news, weight)


def means(tensors: Tensors, dim: int) -> tuple[Tensor, ...]:
    """Of nothing the mean is 0."""
    sums = [x.sum(dim, keepdim=True) for x in tensors]
    return torch._foreach_div(sums, [float(max(x.shape[dim], 1)) for x in tensors])


def wide_zeros(p: Tensor, shape: Sequence[int]) -> Tensor:
    """A state of this shape, 0, beside the parameter. Float32 at least: a 16-bit mean stands still. Of a sharded
    parameter every rank keeps all, as such states are small.
    """
    return torch.zeros(shape, dtype=torch.promote_types(p.dtype.to_real(), torch.float32), device=p.device)


def factored_states(name: str, vectors: bool = True) -> tuple[State, ...]:
    """The states of :func:`inverse_roots`: of a vector one, of more dimensions those of the rows and the columns.

    Args:
        vectors: whether vectors have one.
    """
    whole = State(name, lambda p, _: wide_zeros(p, p.shape) if p.dim() < 2 else None)
    rows = State(f"{name}_row", lambda p, _: wide_zeros(p, p.shape[:-1]) if p.dim() >= 2 else None)
    columns = State(f"{name}_col", lambda p, _: wide_zeros(p, p.shape[:-2] + p.shape[-1:]) if p.dim() >= 2 else None)
    return (whole, rows, columns) if vectors else (rows, columns)


def inverse_roots(
    shards: Shards, squares: list[Tensor], states: list[dict[str, Any]], name: str, weight: Any
) -> list[Tensor]:
    r"""1 over the roots of running means of squares: of matrices of :math:`r c / \operatorname{mean} r`, from the means
    r of the rows and c of the columns.

    Args:
        shards: of the parameters.
        squares: of the parts that are here; more than two dimensions are a batch of matrices. Written.
        states: a parameter's states by name, those of :func:`factored_states` among them; these are updated.
        name: of these.
        weight: of what is new in the means; a number, or a 0-dim tensor.
    """
    roots = list(squares)
    vectors, matrices = shards.vectors, shards.matrices
    wholes, rows, columns = shards.factors(squares)
    if vectors:
        whole = averaged([states[i][name] for i in vectors], wholes, weight)
        for i, root in zip(vectors, shards.here(torch._foreach_rsqrt(whole), vectors), strict=True):
            roots[i] = root
    if matrices:
        held = [
            [states[i][f"{name}_{part}"].unsqueeze(dim) for i in matrices] for part, dim in (("row", -1), ("col", -2))
        ]
        rows, columns = averaged(held[0], rows, weight), averaged(held[1], columns, weight)
        by_row = shards.here(torch._foreach_rsqrt(torch._foreach_div(rows, means(rows, -2))), matrices, -1)
        by_column = shards.here(torch._foreach_rsqrt(columns), matrices, -2)
        for i, row, column in zip(matrices, by_row, by_column, strict=True):
            roots[i] = torch.mul(row, column, out=None if torch.is_grad_enabled() else squares[i])
    return roots


def clipped(shards: Shards, updates: Tensors, threshold: float) -> tuple[Tensor, ...]:
    """Divided by what their root mean square is above the threshold; the parts of them that are here."""
    limits = [threshold * root for root in shards.roots]
    excess = torch._foreach_clamp_min(torch._foreach_div(shards.norms(torch._foreach_norm(updates)), limits), 1.0)
    return torch._foreach_div(updates, excess)
