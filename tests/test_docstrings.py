"""Whatever is public says what it is: in a docstring of its own, or in that of what it overrides."""

import importlib
import inspect
import pkgutil
from types import FunctionType, ModuleType
from typing import Any

import pytest

import triton_optim
from triton_optim import kernels

NAMES = ["triton_optim"] + [
    m.name
    for package in (triton_optim, kernels)
    for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not m.name.endswith("__main__")
]


def public(module: ModuleType) -> list[tuple[str, Any]]:
    """What a module defines: functions, classes, and the methods and properties of these."""
    found: list[tuple[str, Any]] = []
    for name, value in vars(module).items():
        value = getattr(value, "fn", value)  # of a `@jit` function, what is jitted
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            found.append((name, value))
            for inner, part in vars(value).items():
                if not inner.startswith("_") and isinstance(part, (FunctionType, property, classmethod)):
                    found.append((f"{name}.{inner}", getattr(value, inner)))
        elif inspect.isroutine(value):
            found.append((name, value))
    return found


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_whatever_is_public_has_a_docstring(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith("triton_optim.integrations."):
            raise
        pytest.skip(f"{error.name} is not installed, a trainer or what one needs")
    silent = [f"{name}.{inner}" for inner, value in public(module) if not inspect.getdoc(value)]
    assert silent == []
