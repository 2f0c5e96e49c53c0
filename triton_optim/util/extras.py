"""Packages that only some commands need."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec

DISTRIBUTIONS = {
    "rich": "rich",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "optuna": "optuna",
    "numpy": "numpy",
}


def require(modules: Iterable[str], what: str, extra: str) -> None:
    """Raise ValueError if one of the `modules` that `what` needs is not installed; `extra` has them all."""
    missing = [DISTRIBUTIONS[module] for module in modules if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"{what} needs {', '.join(missing)}: not installed in {sys.prefix}. "
            f'Install the extra: pip install -e ".[{extra}]"'
        )
