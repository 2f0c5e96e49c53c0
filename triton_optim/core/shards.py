"""Sums over rows, columns and all of parameters, of which each process may have a part."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..util.layout import added_up, mesh_of, parts_of, split_over


class Shards:
    """The parts of parameters that are here.

    Every rank sums up its part, and they add up the sums: what is sent is as long as rows and columns are many.

    Args:
        params: ordinary tensors, which are here whole, or DTensors of one mesh.

    Attributes:
        vectors: the numbers of those of less than two dimensions.
        matrices: of the others. More than two dimensions are a batch of matrices.
        roots: of the number of elements of each.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.vectors = [i for i, p in enumerate(params) if p.dim() < 2]
        self.matrices = [i for i, p in enumerate(params) if p.dim() >= 2]
        self.roots = [max(p.numel(), 1) ** 0.5 for p in params]
        self._params = params
        self._mesh: Any = mesh_of(params[0]) if params else None
        if self._mesh is not None:
            here = [tuple(self._mesh.get_coordinate())]
            self._indices = [parts_of(p, here)[0][0] for p in params]

    def of_matrices(self) -> Shards:
        """Those of the matrices alone."""
        return Shards([self._params[i] for i in self.matrices]) if self.vectors else self

    def factors(self, squares: Sequence[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What second moments are kept as, the same on every rank: vectors, and of matrices the means of their rows and
        of their columns, in which the last dimension, or the last but one, is 1.

        Args:
            squares: of the parts.
        """
        own = [squares[i] for i in self.matrices]
        wholes = [squares[i] for i in self.vectors]
        rows, columns = ([x.sum(dim, keepdim=True) for x in own] for dim in (-1, -2))
        if self._mesh is not None:
            wanted: list[tuple[int, Tensor, int | None]] = [
                (i, x, 0) for i, x in zip(self.vectors, wholes, strict=True)
            ]
            for dim, sums in ((-1, rows), (-2, columns)):
                wanted += [(i, x, dim) for i, x in zip(self.matrices, sums, strict=True)]
            found = iter(self._whole(wanted))
            wholes, rows, columns = ([next(found) for _ in own] for own in (wholes, rows, columns))
        return wholes, self._means(rows, -1), self._means(columns, -2)

    def _means(self, sums: list[Tensor], dim: int) -> tuple[Tensor, ...]:
        if not sums:
            return ()
        return torch._foreach_div(sums, [float(max(self._params[i].shape[dim], 1)) for i in self.matrices])

    def norms(self, own: Sequence[Tensor]) -> list[Tensor]:
        """The norms of whole tensors.

        Args:
            own: of the parts: one of each parameter, or several, those of one kind after those of another.
        """
        if self._mesh is None:
            return list(own)
        squares = enumerate(torch._foreach_mul(list(own), list(own)))
        return list(torch._foreach_sqrt(self._whole([(k % len(self._params), x, None) for k, x in squares])))

    def here(self, values: Sequence[Tensor], numbers: Sequence[int], gone: int = 0) -> list[Tensor]:
        """The parts of whole tensors that belong to those of the parameters.

        Args:
            values: one for each of these parameters.
            numbers: of these.
            gone: the dimension, counted from the end, in which they are 1; 0 for none.
        """
        if self._mesh is None:
            return list(values)
        return [x[self._index(i, gone)] for i, x in zip(numbers, values, strict=True)]

    def _index(self, number: int, gone: int) -> tuple[Any, ...]:
        index = list(self._indices[number])
        if gone:
            sliced = isinstance(index[gone], slice)
            index[gone] = slice(None) if sliced else index[gone].new_zeros([1] * len(index))
        return tuple(index)

    def _whole(self, wanted: list[tuple[int, Tensor, int | None]]) -> list[Tensor]:
        """Sums over all ranks.

        Args:
            wanted: the number of a parameter; the sums over its part here; the dimension, counted from the end, in
                which they are 1 (0 for none, None of a number).
        """
        alike: dict[Any, list[int]] = {}
        for k, (i, x, _) in enumerate(wanted):
            alike.setdefault((*split_over(self._params[i]), x.dtype), []).append(k)
        found = [x for _, x, _ in wanted]
        for (*dims, _), own in alike.items():
            if not dims:
                continue
            wholes = [self._placed(*wanted[k]) for k in own]
            sums = added_up(torch.cat([x.reshape(-1) for x in wholes]), self._mesh, dims)
            pieces = torch.split(sums, [prod(x.shape) for x in wholes])
            for k, x, piece in zip(own, wholes, pieces, strict=True):
                found[k] = piece.view(x.shape)
        return found

    def _placed(self, number: int, x: Tensor, gone: int | None) -> Tensor:
        """Where sums over the part that is here lie among those of the whole, which are 0 elsewhere."""
        if gone is None:
            return x
        shape = list(self._params[number].shape)
        if gone:
            shape[gone] = 1
        whole = x.new_zeros(shape)
        whole[self._index(number, gone)] = x
        return whole
