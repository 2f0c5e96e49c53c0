"""What names mean: built-in ones, and `module:name` for a user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..util import extras
from ..util.named import load


class RaceError(Exception):
    """A race cannot start or go on; the message is one line of value, cause and fix."""


@contextmanager
def as_race_error() -> Iterator[None]:
    """What is wrong with what a user gave is wrong with the race."""
    try:
        yield
    except ValueError as error:
        raise RaceError(str(error)) from error


def require(modules: Sequence[str], what: str) -> None:
    """Raise RaceError if one of the optional `modules` that `what` needs is not installed."""
    with as_race_error():
        extras.require(modules, what, "race")


def resolve(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """What `name` means: one of `known`, or, as `module:name`, what a module has.

    Modules of the current directory are found, as with ``python -m``.

    Args:
        kind: what is looked for, in a word, for the messages.
        name: the name.
        known: the built-in ones.

    Raises:
        RaceError: there is no such name or module, or the module cannot be imported.
    """
    if name in known:
        return known[name]
    if ":" not in name:
        raise RaceError(
            f"There is no {kind} {name!r}. Choose from {', '.join(sorted(known))}, or name your own as mymodule:name."
        )
    with as_race_error():
        return load(f"The {kind}", name)
