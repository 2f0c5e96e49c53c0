"""What a mutant is."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """An edit.

    Attributes:
        name: what is wrong then.
        matters: what a user would see of it.
        old: what is found exactly once in the code.
        new: what takes its place.
        test: that should notice it, as pytest calls it.
    """

    name: str
    matters: str
    old: str
    new: str
    test: str
