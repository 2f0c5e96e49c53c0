"""The source of a rule is that which was defined: of a file that is edited, of a text, in an archive, compiled."""

from __future__ import annotations

import importlib
import linecache
import py_compile
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPP, TRITON_LOOPS
from own_rules import BACKENDS, G, M, P, optimizer_of, stepped
from own_rules import defined as defined
from torch.nn import Parameter

from triton_optim.engine import fallback
from triton_optim.kernels.language import RuleError, jit, python_function
from triton_optim.kernels.straight import straight

# Where a rule is defined, and when.

TEXT = """
from triton_optim.kernels.language import jit, sqrt

SCALE = 2.0

@jit
def rule(p, g, m, h):
    return p - 1.0 * g, m + SCALE
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_is_edited_after_it_was_imported(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs is what was imported; what is imported anew is the new."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "edited_rule.py"
    path.write_text(TEXT)
    sys.modules.pop("edited_rule", None)
    module = importlib.import_module("edited_rule")
    path.write_text("\n" + TEXT.replace("p - 1.0 * g", "p + 1.0 * g"))
    linecache.checkcache()
    found = stepped(module.rule, backend)[0]
    assert found == pytest.approx([p - g for p, g in zip(P, G, strict=True)])
    found = stepped(importlib.reload(module).rule, backend)[0]
    assert found == pytest.approx([p + g for p, g in zip(P, G, strict=True)])
    sys.modules.pop("edited_rule")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("around", ["module", "function"])
def test_a_number_that_changes_raises(around: str, backend: str, defined: Any) -> None:
    scale = 1.0
    if around == "module":
        rule, _ = defined("m = m + FACTOR")
        change = lambda value: rule_globals.__setitem__("FACTOR", value)  # noqa: E731
        rule_globals = python_function(rule).__globals__
        name = "FACTOR"
    else:

        @jit
        def rule(p, g, m, h):
            return p, m + scale

        def change(value: float) -> None:
            nonlocal scale
            scale = value

        name = "scale"
    p = Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = optimizer_of(rule)([p], backend=backend)
    optimizer.step()
    before = optimizer.state[p]["m"].clone()
    change(3.0)
    with pytest.raises(RuleError, match=rf"{name}, which the rule rule reads, was .* and is 3.0 now.*scalars\(\)"):
        optimizer.step()
    with pytest.raises(RuleError, match=f"{name}, which"):
        optimizer_of(rule)([p], backend=backend)
    assert torch.equal(optimizer.state[p]["m"], before)
    change(0.3 if around == "module" else 1.0)
    optimizer.step()
    assert torch.allclose(optimizer.state[p]["m"], 2 * before)


def test_a_rule_of_a_text_without_a_file() -> None:
    with pytest.raises(RuleError, match=r"source of rule can't be read \(<nowhere>\).*Define the function in a file"):
        exec(compile(TEXT, "<nowhere>", "exec"), {})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rule_of_a_text_that_python_was_told_of(backend: str) -> None:
    """As what the error says, and as a notebook's cell."""
    name, scope = "<a cell>", {"__name__": "__main__"}
    linecache.cache[name] = (len(TEXT), None, TEXT.splitlines(True), name)
    exec(compile(TEXT, name, "exec"), scope)
    del linecache.cache[name]
    assert stepped(scope["rule"], backend)[1] == pytest.approx([m + 2 for m in M])


def test_a_rule_in_a_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "rules.zip", "w") as archive:
        archive.writestr("zipped_rule.py", TEXT)
    monkeypatch.syspath_prepend(tmp_path / "rules.zip")
    module = importlib.import_module("zipped_rule")
    assert ".zip" in module.__file__
    for backend in ("eager", *(["cpp"] if not CPP.args[0] else []), *(["triton"] if TRITON_LOOPS else [])):
        assert stepped(module.rule, backend)[1] == pytest.approx([m + 2 for m in M])
    sys.modules.pop("zipped_rule")


def test_a_rule_of_which_only_compiled_code_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs where no source is needed, unchecked; automatically, too."""
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "sourceless_rule.py"
    source.write_text(TEXT)
    py_compile.compile(str(source), cfile=str(tmp_path / "sourceless_rule.pyc"))
    source.unlink()
    module = importlib.import_module("sourceless_rule")
    assert stepped(module.rule, "eager")[1] == pytest.approx([m + 2 for m in M])
    monkeypatch.setattr(fallback, "next_best", lambda *_: "eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert stepped(module.rule, "auto")[1] == pytest.approx([m + 2 for m in M])
    assert all("Install its .py file, too" in str(warning.message) for warning in said)
    sys.modules.pop("sourceless_rule")


def test_a_file_that_no_longer_holds_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written between import and decoration: another function stands there."""

    def rule(p, g, m, h):
        return p, m

    rule.__name__ = "renamed"
    with pytest.raises(RuleError, match=r"test_rule_sources\.py, line \d+, holds no `def renamed`"):
        straight(jit(rule))
