"""Warnings that a process gives once."""

from __future__ import annotations

import warnings

_said: set[str] = set()


def warn_once(message: str) -> None:
    """Warn of what this process has not been warned of yet."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
