"""The matrices that a parameter consists of: one, or those of a batch, a flattened convolution, fused ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.factored import lerped
from ...util.in_place import write_each
from ...util.layout import is_sharded, split_over

EXTRA_DIMS = (None, "batch", "flatten")


class MatrixLike(NamedTuple):
    """What is asked of a matrix that is made when it is its turn."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


class Pieces:
    """The matrices that the parameters of a group consist of, which are orthogonalized one by one.

    A parameter is a matrix of `rows` below each other: of more than two dimensions with ``extra_dims="batch"`` those of
    all matrices of the batch, with ``"flatten"`` its first dimension. ``splits`` cuts each matrix by its rows.

    Attributes:
        plain: every parameter is one piece, itself.
        shapes: of each piece.
        owners: the number of the parameter that each piece is of.
    """

    def __init__(self, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        self._flatten = group.get("extra_dims") == "flatten"
        self._params = params
        self.plain = group.get("splits") is None and all(p.dim() == 2 for p in params)
        if self.plain:
            self.shapes: list[Any] = [p.shape for p in params]
            self.owners: Sequence[int] = range(len(params))
            return
        self._rows = [rows_of(p.shape, group) for p in params]
        columns = [prod(p.shape[1:]) if self._flatten else p.shape[-1] for p in params]
        self.shapes = [(n, wide) for rows, wide in zip(self._rows, columns, strict=True) for n in rows]
        self.owners = [k for k, rows in enumerate(self._rows) for _ in rows]
        self._starts = [0, *accumulate(map(len, self._rows))]

    def cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The pieces of tensors that have the rows of the parameters, one a parameter: views where that can be."""
        if self.plain:
            return list(tensors)
        return [piece for k, tensor in enumerate(tensors) for piece in self._of(k, tensor)]

    def _of(self, k: int, tensor: Tensor) -> list[Tensor]:
        if tensor.dim() > 2:
            if self._flatten:
                tensor = tensor.reshape(len(tensor), prod(tensor.shape[1:]))
            else:
                tensor = tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])
        rows = self._rows[k]
        return list(torch.split(tensor, rows)) if len(rows) != 1 else [tensor]

    def join(self, pieces: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> list[Tensor]:
        """A tensor of its shape for each parameter.

        Args:
            like: tensors of other shapes than the parameters', which the pieces were cut of.
        """
        if self.plain:
            return list(pieces)
        whole = []
        for k, tensor in enumerate(self._params if like is None else like):
            own = pieces[self._starts[k] : self._starts[k + 1]]
            if own:
                whole.append((torch.cat(list(own)) if len(own) > 1 else own[0]).reshape(tensor.shape))
            else:
                whole.append(torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device))
        return whole

    def costs(self) -> list[float]:
        """About how many operations an iteration of each parameter takes, up to a factor that all have."""
        found = [0.0] * len(self._params)
        for owner, shape in zip(self.owners, self.shapes, strict=True):
            found[owner] += float(min(shape)) ** 2 * max(shape)
        return found

    def averaged(self, held: list[Tensor], news: Sequence[Tensor], weight: Any) -> tuple[Tensor, ...]:
        """:func:`core.factored.averaged` of states, one a parameter, and of what is new of each piece: by pieces."""
        averages = lerped(self.cut(held), list(news), weight)
        write_each(held, self.join(averages, held))
        return averages

    def like(self, tensors: Sequence[Tensor]) -> Sequence[Any]:
        """What the pieces of tensors of the parameters' shapes are like."""
        if self.plain:
            return tensors
        each = zip(self.owners, self.shapes, strict=True)
        return [MatrixLike(shape, tensors[k].dtype, tensors[k].device) for k, shape in each]

    def fetching(self, fetch: Callable[[list[int]], list[Tensor]]) -> Callable[[list[int]], list[Tensor]]:
        """What makes the pieces of these numbers, of what makes whole parameters: each of these once."""
        if self.plain:
            return fetch
        ready: dict[int, Tensor] = {}

        def fetch_pieces(indices: list[int]) -> list[Tensor]:
            new = list(dict.fromkeys(self.owners[i] for i in indices if i not in ready))
            for k, whole in zip(new, fetch(new) if new else (), strict=True):
                ready.update(enumerate(self._of(k, whole), self._starts[k]))
            return [ready.pop(i) for i in indices]

        return fetch_pieces


def rows_of(shape: Sequence[int], group: dict[str, Any]) -> list[int]:
    """The rows of each matrix of a parameter of this shape."""
    batched = group.get("extra_dims") != "flatten"
    rows = shape[-2] if batched else shape[0]
    splits = group.get("splits")
    if splits is None:
        splits = 1
    each = [rows // splits] * splits if isinstance(splits, int) else list(splits)
    return each * (prod(shape[:-2]) if batched else 1)


def cut_between_matrices(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether a parameter is sharded such that each rank has whole matrices of its batch."""
    if not is_sharded(p) or group.get("extra_dims") != "batch" or p.dim() == 2:
        return False
    own: Any = p
    return all(own.placements[dim].dim % p.dim() < p.dim() - 2 for dim in split_over(p))


def check_pieces(group: dict[str, Any]) -> None:
    """Raise ValueError where a group says of no parameter which matrices it consists of."""
    extra, splits = group.get("extra_dims"), group.get("splits")
    if extra not in EXTRA_DIMS:
        raise ValueError(
            f'Invalid extra_dims: {extra!r}. Use "batch" where the last two dimensions are a matrix each, "flatten" '
            "for convolutions, whose first dimension are the rows, or leave it out."
        )
    counts = [splits] if isinstance(splits, int) else splits
    if splits is not None and not (
        isinstance(counts, (list, tuple)) and counts and all(type(n) is int and n > 0 for n in counts)
    ):
        raise ValueError(
            f"Invalid splits: {splits!r}. Give the number of blocks of rows, all of one size, or a list of the rows "
            "that each has."
        )


def check_shape(name: str, index: int, p: Tensor, group: dict[str, Any]) -> None:
    """Raise ValueError where a parameter is not of matrices, or not cut as its group says."""
    shape, splits = tuple(p.shape), group.get("splits")
    if p.dim() < 2 or (p.dim() > 2 and group.get("extra_dims") is None):
        several = (
            ' Where its last two dimensions are a matrix each, as of experts, give its group "extra_dims": "batch"; of '
            'a convolution "flatten".'
        )
        raise ValueError(
            f"{name} only supports 2D parameters; parameter {index} has shape {shape}. Give it to AdamW, in "
            'a group with "use_muon": False; muon_param_groups(model) sorts a whole model so.' + several * (p.dim() > 2)
        )
    if splits is None:
        return
    rows = shape[0] if group.get("extra_dims") == "flatten" else shape[-2]
    if rows % splits if isinstance(splits, int) else sum(splits) != rows:
        raise ValueError(
            f"Invalid splits: {splits!r} for parameter {index} of shape {shape}, which has {rows} rows. Give a number "
            "that divides them, or counts that add up to them; other parameters belong in a group of their own."
        )
