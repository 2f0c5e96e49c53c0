"""A user's own function or class, named as ``module:name``."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def load(what: str, name: str) -> Callable[..., Any]:
    """The function or class of this name; modules of the current directory are found, as with ``python -m``.

    Args:
        what: what it is, for the messages.
        name: such as ``mymodule:make_model``.

    Raises:
        ValueError: there is no such module or name, or the module cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"{what} {name!r} is not there: importing {module_name!r} raised {cause_of(error)}. "
            f"Modules are looked for in {os.getcwd()} and among the installed ones."
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        names = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(
            f"{what} {name!r} is not there: {module_name} has no function or class {attribute!r}. "
            f"It has {', '.join(names) or 'none'}."
        )
    called: Callable[..., Any] = found
    return called


def cause_of(error: Exception) -> str:
    """What was raised, and where, in one line."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})".replace("\n", " ")
