"""A user's own model or optimizer, named as ``module:name``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from .models import Shapes


def load(what: str, name: str) -> Callable[..., Any]:
    """The function or class `name` of a module, as ``module:name``; modules of the current directory are found.

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
        cause = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ValueError(
            f"{what} {name}: importing {module_name!r} raised {cause}. Modules are looked for in {os.getcwd()} and "
            "among the installed ones."
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        names = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(
            f"{what} {name}: {module_name} has no function or class {attribute!r}. It has {', '.join(names) or 'none'}."
        )
    called: Callable[..., Any] = found
    return called


def own_shapes(name: str) -> Shapes:
    """The shapes of the parameters of the `torch.nn.Module` that ``module:name`` returns; tied ones count once.

    Raises:
        ValueError: it is not there, or returns no module with parameters that are trained.
    """
    model = load("--model", name)()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name} returned {type(model).__name__}. Return a torch.nn.Module.")
    shapes: Shapes = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    if not shapes:
        raise ValueError(f"--model {name} returned a module without parameters that require gradients.")
    return shapes
