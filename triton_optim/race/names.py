"""What names mean: built-in ones, and `module:name` for a user's own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ..util.named import load

DISTRIBUTIONS = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn", "optuna": "optuna"}


class RaceError(Exception):
    """A race cannot start or go on; the message is one line of value, cause and fix."""


def require(modules: Sequence[str], what: str) -> None:
    """Raise RaceError if one of the optional `modules` that `what` needs is not installed."""
    missing = [DISTRIBUTIONS[module] for module in modules if find_spec(module) is None]
    if missing:
        raise RaceError(
            f"{what} needs {', '.join(missing)}: not installed in {sys.prefix}. "
            'Install the extra: pip install -e ".[race]"'
        )


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
    try:
        return load(f"The {kind}", name)
    except ValueError as error:
        raise RaceError(str(error)) from error
