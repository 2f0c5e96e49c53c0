"""A kernel of an edited rule is compiled anew: by the process that has the old one in memory, and by the next."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from stub_launches import compiled_for, forget_kernels

pytestmark = pytest.mark.compiled

MODULE = """
from typing import NamedTuple
from triton_optim import RuleOptimizer
from triton_optim.kernels.language import jit

class Scalars(NamedTuple):
    lr: float
    gain: float

@jit
def helper(g):
    return g * 2.25

@jit
def plain(p, g, h):
    return (p - h.lr * g * h.gain * h.gain,)

@jit
def with_helper(p, g, h):
    return (p - h.lr * helper(g),)

@jit
def with_constant(p, g, h):
    return (p - h.lr * g * 3.25,)

class OfScalars(RuleOptimizer):
    rule = plain
    def __init__(self, params, lr=1e-3, **options):
        super().__init__(params, {"lr": lr}, **options)
    def scalars(self, group, step):
        return Scalars(lr=group["lr"], gain=2.0)

class OfHelper(OfScalars):
    rule = with_helper

class OfConstant(OfScalars):
    rule = with_constant
"""


def edited(text: str) -> str:
    """The rule of each optimizer changed in another way."""
    return (
        text.replace("    lr: float\n    gain: float", "    gain: float\n    lr: float")
        .replace("2.25", "4.75")
        .replace("3.25", "5.25")
    )


def check_edited(before: dict[str, str], after: dict[str, str]) -> None:
    """The kernels are those of the text as it was, and as it is."""
    constants = {"OfHelper": ("2.25", "4.75"), "OfConstant": ("3.25", "5.25")}
    for name, numbers in constants.items():
        for ir, number in zip((before[name], after[name]), numbers, strict=True):
            assert f"{number}0000e+00" in ir
    assert before["OfScalars"] != after["OfScalars"]


def test_edited_rules_are_compiled_anew_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_kernels()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # its files are told apart by whole seconds
    path = tmp_path / "edited_rules.py"
    path.write_text(MODULE)
    module = importlib.import_module("edited_rules")
    before = compiled_for(module)
    path.write_text(edited(MODULE))
    check_edited(before, compiled_for(importlib.reload(module)))


def test_edited_rules_are_compiled_anew_by_the_next_process(tmp_path: Path) -> None:
    """Though it finds what the last one compiled on disk."""
    code = "import json, edited_rules, stub_launches; print(json.dumps(stub_launches.compiled_for(edited_rules)))"
    folders = os.pathsep.join([str(tmp_path), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": folders,
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    found = []
    for text in (MODULE, edited(MODULE)):
        (tmp_path / "edited_rules.py").write_text(text)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    check_edited(*found)
