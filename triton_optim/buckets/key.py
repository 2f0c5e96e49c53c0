"""What the parameters that one backend updates together have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..dispatch import Choice
from ..precision.codecs import Codec
from ..spec import Variant


class Key(NamedTuple):
    """What the tensors of a bucket have in common."""

    choice: Choice
    device: torch.device
    variant: Variant
    gradient: torch.dtype
    codecs: tuple[Codec, ...]  # a result of the rule: the parameter, the states
    aligned: bool  # every address is a multiple of 16
    capturable: bool
    differentiable: bool
    sparse: bool = False  # the gradients are, and only the elements that they hold are updated
    piece: int = 0  # of a step that is taken in pieces
    home: torch.device | None = None  # where the parameters are that are stepped on the host; None where they are

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """A role: parameter, gradient, states; of what has parts, the first's."""
        param, *states = (codec.dtypes[0] for codec in self.codecs)
        return (param, self.gradient, *states)

    @property
    def random(self) -> bool:
        """Whether a codec takes random bits."""
        return any(codec.random for codec in self.codecs)

    @property
    def block_size(self) -> int:
        """How many elements share a scale; 0 where there is none."""
        return max(codec.block_size for codec in self.codecs)

    @property
    def compute(self) -> torch.dtype:
        """What the arithmetic is done in."""
        return torch.float64 if self.dtypes[0] in (torch.float64, torch.complex128) else torch.float32


class Piece(NamedTuple):
    """Elements of a parameter, as they lie in memory: all of them, or what a backend takes at a time."""

    slot: int
    start: int
    stop: int
    first: int  # the index of the first in the whole parameter


def pieces_of(numels: Sequence[int], first: Sequence[int], longest: int | None, block_size: int) -> list[Piece]:
    """The pieces of parameters. None has indices whose upper halves differ, and an incomplete block is a piece.

    Args:
        numels: elements of each parameter here.
        first: the index of the first of them in the whole parameter.
        longest: elements of the longest piece; None for a piece a parameter.
        block_size: how many elements share a scale, or 1.
    """
    if longest is None:
        return [Piece(i, 0, numel, index) for i, (numel, index) in enumerate(zip(numels, first, strict=True))]
    pieces = []
    for i, (numel, index) in enumerate(zip(numels, first, strict=True)):
        start = 0
        while start < numel:
            left = numel - start
            most = min(longest, (1 << 32) - (index + start) % (1 << 32))
            stop = start + min(left // block_size * block_size or left, most)
            pieces.append(Piece(i, start, stop, index + start))
            start = stop
    return pieces
