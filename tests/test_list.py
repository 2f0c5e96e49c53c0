"""What there is to choose from: that each has an entry, that the entries are true, and what the command says."""

from __future__ import annotations

import json
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_optim import AdamW, cli
from triton_optim.catalog import KINDS, entries, source_of
from triton_optim.core.memory import state_bytes
from triton_optim.registry import optimizers, rule_optimizers, wrappers

KERNELS = json.loads((Path(__file__).parent / "costs" / "kernels.json").read_text())["cases"]
ALL = {e.name: e for e in entries()}


@pytest.mark.parametrize("name", ALL)
def test_each_says_what_it_is_for_and_who_published_it(name: str) -> None:
    e = ALL[name]
    where = "the docstring of its class needs a paragraph"
    assert e.use.endswith("."), f"{name}: {where} `For: ...`"
    assert e.paper, f"{name}: {where} `Source: ...`"
    assert not e.url or e.url.startswith("https://")
    assert "|" not in e.use + e.paper, "the table is Markdown"


def test_all_are_there() -> None:
    assert {*ALL} == {cls.__name__ for cls in optimizers().values()} | {*wrappers()}
    assert {e.name for e in ALL.values() if e.wrapper} == {*wrappers()}
    assert {kind for e in ALL.values() for kind in e.kinds} == {*KINDS}


@pytest.mark.parametrize(
    ("name", "kinds", "state", "moved"),
    [
        ("AdamW", ("elementwise",), 8, 28),  # p, g and two states read, all but g written
        ("SGD", ("elementwise",), 0, 12),
        ("Lion", ("elementwise",), 4, 20),
        ("Adan", ("elementwise",), 16, 44),
        ("LAMB", ("parameter",), 8, None),
        ("LARS", ("parameter",), 4, None),
        ("Prodigy", ("model",), 16, None),
        ("CAME", ("rows",), 4, None),
        ("Muon", ("matrices",), 4, None),
        ("LBFGS", ("closure",), 8 * 102, None),  # 101 pairs, the direction and the gradient
        ("NonlinearCG", ("closure",), 8, None),
        ("SparseAdam", ("sparse",), 8, None),
        ("ScheduleFreeAdamW", ("elementwise", "eval"), 8, 28),
        ("cautious", ("parameter",), 0, None),
        ("cautious_decay", ("elementwise",), 0, 28),
        ("lookahead", ("elementwise",), 4, 36),
        ("centralized", ("rows",), 0, None),
    ],
)
def test_kinds_and_bytes(name: str, kinds: tuple[str, ...], state: float, moved: float | None) -> None:
    e = ALL[name]
    assert e.kinds == kinds
    assert sum(e.states.values()) == pytest.approx(state, abs=0.1)
    if moved is not None:
        assert e.moved == pytest.approx(moved)
        assert e.beside_adamw == pytest.approx(moved / 28)
    assert (e.moved is None) == ("closure" in kinds)
    if kinds[0] in ("parameter", "model"):  # what it measures is read besides: at least the gradient, at most all
        floor = 12 + 2 * (state + 8 * e.wrapper)
        assert floor + 4 <= e.moved <= floor + 8 + state + 8 * e.wrapper


def test_a_step_moves_what_the_audit_found_compiled() -> None:
    compared = 0
    for cls in rule_optimizers().values():
        make: Any = cls
        optimizer = make([torch.nn.Parameter(torch.empty(2, 2, device="meta"))])
        rule = optimizer.variant(optimizer.param_groups[0]).rule
        e, case = ALL[cls.__name__], KERNELS.get(f"{rule.__name__}, fp32, sm_90")
        if case is not None and e.kinds[0] == "elementwise":
            assert e.moved == case["loaded"] + case["stored"], cls
            compared += 1
    assert compared > 15


def test_states_are_those_of_a_step() -> None:
    for name, cls in rule_optimizers().items():
        if name == "sparseadam":
            continue
        make: Any = cls
        p = torch.nn.Parameter(torch.randn(64, 64))
        optimizer = make([p], backend="eager")
        p.grad = torch.randn_like(p)
        optimizer.step()
        found = state_bytes(optimizer) / p.numel()
        # Rows and columns, of which none keeps more than four, weigh more in a smaller matrix.
        assert sum(ALL[cls.__name__].states.values()) == pytest.approx(found, abs=4 * 4 / 64 + 0.02), name


def test_papers_are_read_from_docstrings() -> None:
    class Own:
        """Momentum.

        Source: Me, You & Others 2026, Algorithm 1, https://example.org/paper; more of it, https://example.org/other.
        """

    class Old(Own):
        """Momentum.

        Source: A book, section 5; Somebody 1990, https://example.org/another.
        """

    assert source_of(Own) == ("Me, You & Others 2026", "https://example.org/paper")
    assert source_of(Old) == ("A book", "")
    assert source_of(AdamW) == ("Loshchilov & Hutter 2019", "https://arxiv.org/abs/1711.05101")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["list", *arguments]) == 0
    return capsys.readouterr().out


def test_the_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out = said(capsys)
    lines = out.splitlines()
    assert lines[0].split() == ["optimizer", "kind", "state", "step", "paper"]
    assert [name for name in ALL if not any(line.startswith(f"{name} ") for line in lines)] == []
    assert max(map(len, lines)) <= 120
    assert "Loshchilov & Hutter 2019\n    Transformers and most other networks" in out
    assert "It is computed (backends/costs.py), not\nmeasured." in out
    few = said(capsys, "--kind", "eval")
    assert "ScheduleFreeAdamW" in few
    assert "AdamW " not in few.replace("ScheduleFreeAdamW ", "").partition("state:")[0]
    assert {e["name"] for e in json.loads(said(capsys, "--kind", "wrapper", "--json"))} == {*wrappers()}


def test_one_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "prodigy")
    for line in (
        "paper      Mishchenko and Defazio 2023 https://arxiv.org/abs/2306.06101",
        "kind       sums over the model",
        "launches   3 a step",
        '    >>> optimizer = triton_optim.Prodigy([p], backend="eager")',
        "help(triton_optim.Prodigy) has the maths.",
    ):
        assert f"{line}\n" in out, line
    assert "exp_avg_sq (4, never negative), s (4), p0 (4, never quantized), d\n           (a number)" in out
    assert re.search(r"^step       \d+ bytes an element, [\d.]+ x AdamW's$", out, re.M)
    assert "arguments  params, lr=1.0, betas=(0.9, 0.999)" in out
    assert "state_dtype" in out.partition("options")[2]
    assert "tuned      lr=1.0, use_bias_correction=True, weight_decay=0.1: tuned for language models" in out
    assert "tuned  " not in said(capsys, "radam")
    assert "up to the model" in said(capsys, "LBFGS")
    assert "a wrapper, here around AdamW" in said(capsys, "lookahead")
    (muon,) = json.loads(said(capsys, "muon", "--json"))
    assert (muon["kinds"], muon["state"], muon["products"]) == (["matrices"], 4.0, 5 * 3 * 2 * 1024)


@pytest.mark.parametrize("name", ALL)
def test_each_can_be_asked_for(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, name).startswith(f"{name}\nfor        ")


def test_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "adanw"]) == 1
    assert capsys.readouterr().err.startswith(
        "adanw: there is no optimizer or wrapper of that name. Did you mean Adan or AdamW or NAdamW?"
    )
    assert cli.main(["list", "qqqq"]) == 1
    assert capsys.readouterr().err.endswith("of that name. `triton-optim list` has their names.\n")
    assert cli.main(["list", "adam", "--kind", "eval"]) == 1
    assert "Give one of the two" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["list", "--kind", "evil"])
    assert "invalid choice: 'evil' (choose from " in capsys.readouterr().err


def test_output_that_nobody_reads_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``triton-optim list | head`` has it."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["list"]) == 0


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("triton_optim.cli.list.run", interrupted)
    assert cli.main(["list"]) == 130
    assert "triton-optim list was interrupted." in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        cli.main(["--version"])
    assert status.value.code == 0
    assert capsys.readouterr().out == f"triton-optim {version('triton-optim')}\n"


def test_parameters_as_models_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for given in ("7e9", "7B", "7000m"):
        assert cli.main(["memory", "--params", given]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    with pytest.raises(SystemExit):
        cli.main(["memory", "--params", "7X"])
    assert "'7X' is no number. Give one such as 7e9, 7B or 350M." in capsys.readouterr().err
