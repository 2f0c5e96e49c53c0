"""Launches of Triton kernels, watched or replaced."""

from collections.abc import Callable
from typing import Any

import pytest


def replace_launches(monkeypatch: pytest.MonkeyPatch, by: Callable[..., None]) -> Callable[..., None]:
    """Call ``by(launcher, programs, *arguments)`` in place of every launch. Returns what makes one, called alike."""
    from triton_optim.backends.triton.launch import Launcher

    launch = Launcher.__call__
    monkeypatch.setattr(Launcher, "__call__", by)
    return launch


def watch_launches(monkeypatch: pytest.MonkeyPatch, watch: Callable[..., None]) -> None:
    """Call ``watch(launcher, programs, *arguments)`` before every launch."""

    def watched(launcher: Any, programs: int, *arguments: Any) -> None:
        watch(launcher, programs, *arguments)
        launch(launcher, programs, *arguments)

    launch = replace_launches(monkeypatch, watched)
