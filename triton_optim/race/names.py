"""What names mean: built-in ones, and `module:name` for a user's own."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

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
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise RaceError(
            f"There is no {kind} {name!r}. Choose from {', '.join(sorted(known))}, or name your own as mymodule:name."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RaceError(
            f"The {kind} {name!r} is not there: importing {module_name!r} raised {cause_of(error)}. "
            f"Modules are looked for in {os.getcwd()} and among the installed ones."
        ) from error
    if not callable(found := getattr(module, attribute, None)):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RaceError(
            f"The {kind} {name!r} is not there: {module_name} has no function or class {attribute!r}. "
            f"It has {', '.join(sorted(callables)) or 'none'}."
        )
    return found


def cause_of(error: Exception) -> str:
    """What was raised, and where, in one line."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})".replace("\n", " ")
