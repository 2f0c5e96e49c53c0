"""Stand-ins for clients that are not installed, and what their trainers hold."""

import importlib
import sys
import types
from typing import Any

import pytest
import torch

import triton_optim as to


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, modules: dict[str, dict[str, Any]]) -> Any:
    """The module `name` of integrations, which finds these modules in the place of its client's."""
    paths = {".".join(path.split(".")[: i + 1]) for path in modules for i in range(len(path.split(".")))}
    for path in sorted(paths):
        module = types.ModuleType(path)
        module.__dict__.update(modules.get(path, {}))
        monkeypatch.setitem(sys.modules, path, module)
    own = f"triton_optim.integrations.{name}"
    monkeypatch.delitem(sys.modules, own, raising=False)
    module = importlib.import_module(own)
    monkeypatch.delitem(sys.modules, own)
    return module


def made(model: torch.nn.Module, **options: Any) -> Any:
    return to.AdamW(model.parameters(), **({"lr": 0.05, "ema_decay": 0.8, "backend": "eager"} | options))
