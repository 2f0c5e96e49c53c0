"""Parameters as matrices, and large matrices as blocks that are preconditioned each on its own."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad


def matrix_shape(p: Tensor) -> tuple[int, int]:
    """The rows and columns of a parameter as a matrix: its first dimension, and all others."""
    rows = len(p) if p.dim() else 1
    return rows, p.numel() // max(rows, 1)


class Blocks(NamedTuple):
    """How a matrix is cut: in as few blocks as there can be, all of one shape. The last ones are filled up with zeros,
    less than a row or column for each block.

    Attributes:
        whole: the rows and columns of the matrix.
        down, across: how many blocks follow each other.
        shape: the rows and columns of a block.
    """

    whole: tuple[int, int]
    down: int
    across: int
    shape: tuple[int, int]

    @property
    def number(self) -> int:
        """How many blocks there are."""
        return self.down * self.across

    def cut(self, x: Tensor) -> Tensor:
        """The blocks of a batch of matrices, ``(B * number, *shape)``, each matrix row by row of blocks."""
        if self.number == 1:
            return x
        (rows, columns), (m, n) = self.shape, self.whole
        filled = pad(x, (0, self.across * columns - n, 0, self.down * rows - m))
        each = filled.view(len(x), self.down, rows, self.across, columns).transpose(2, 3)
        return each.reshape(-1, rows, columns)

    def joined(self, x: Tensor) -> Tensor:
        """The matrices of a batch of blocks, ``(B, *whole)``."""
        if self.number == 1:
            return x
        (rows, columns), (m, n) = self.shape, self.whole
        each = x.view(-1, self.down, self.across, rows, columns).transpose(2, 3)
        return each.reshape(-1, self.down * rows, self.across * columns)[:, :m, :n]


def blocks_of(p: Tensor, longest: int | None) -> Blocks:
    """The blocks of a parameter.

    Args:
        longest: rows and columns that one may have; None for one block.
    """
    whole = matrix_shape(p)
    down, across = (1 if longest is None else max(math.ceil(n / longest), 1) for n in whole)
    return Blocks(whole, down, across, (math.ceil(whole[0] / down), math.ceil(whole[1] / across)))
