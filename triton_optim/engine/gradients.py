"""What a step makes of its gradients before parameters are sorted into buckets."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..spec import Update


def turns_of(params: list[Tensor], gradients: list[Tensor | None]) -> list[list[Tensor | None]]:
    """The gradients of each step where a parameter is listed k times, as torch warns not to do: it makes k."""
    seen: dict[int, int] = {}
    turns = []
    for p in params:
        turns.append(seen.get(id(p), 0))
        seen[id(p)] = turns[-1] + 1
    return [
        [g if turn == now else None for g, turn in zip(gradients, turns, strict=True)] for now in range(max(turns) + 1)
    ]


def without_needless_sparsity(optimizer: Update, gradients: list[Tensor | None]) -> list[Tensor | None]:
    """The gradients, those made dense that would be updated alike; the others of sparse layout stay."""
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    return [
        g.to_dense() if g is not None and g.is_sparse and _wants_dense(optimizer, group) else g
        for g, group in zip(gradients, groups, strict=True)
    ]


def _wants_dense(optimizer: Update, group: dict[str, Any]) -> bool:
    # The other backends have no way to run single rows.
    rows = optimizer.backend in ("auto", "eager") or not optimizer.takes_dense_gradients
    kind = optimizer.sparse_gradients(group)
    return kind == "dense" or (kind == "rows" and not rows)
