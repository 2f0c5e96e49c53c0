"""The pages of docs/ hold what they say: their code runs, their links and the messages that they quote are there.

`.ci/docs.sh` builds them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import socket
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import triton_optim
from triton_optim import cli, kernels
from triton_optim.registry import optimizers, wrappers

ROOT = Path(__file__).parents[1]
DOCS, SITE = ROOT / "docs", ROOT / "docs" / "site"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
ALL = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("*/README.md")), *PAGES]
RUN = [path for path in PAGES if path.parent.name != "trainers"]  # those run where their trainer is installed
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.M | re.S)
MADE = {f"{name.lower()}.md" for name in (*(cls.__name__ for cls in optimizers().values()), *wrappers(), "index")}


def name_of(path: Path) -> str:
    """Of a page, as the repository has it."""
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """The blocks of code of a page, in order."""
    return [text for _, found, text in BLOCK.findall(path.read_text()) if found == language]


@pytest.mark.parametrize("path", [path for path in RUN if blocks(path, "python")], ids=name_of)
def test_the_code_of_a_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page after each other, as a module of a file: Triton reads a rule's source."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    name = f"page_{re.sub(r'[^a-z]', '_', name_of(path))}"
    file = tmp_path / f"{name}.py"
    file.write_text("\n".join(blocks(path, "python")))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)
    spec.loader.exec_module(module)


def commands() -> list[str]:
    """The command lines of ours that stand in blocks for a shell."""
    lines = [line for path in ALL for text in blocks(path, "sh") for line in text.splitlines()]
    parts = {part.strip() for line in lines for part in line.split("&&")}
    return sorted(part for part in parts if part.startswith("triton-optim "))


@pytest.mark.parametrize("command", commands())
def test_commands_have_arguments_that_there_are(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, name, *arguments = shlex.split(command, comments=True)
    monkeypatch.setattr(importlib.import_module(f"triton_optim.cli.{name}"), "run", lambda args: 0)
    assert cli.main([name, *arguments]) == 0


def test_every_page_is_in_the_navigation() -> None:
    text = (SITE / "mkdocs.yml").read_text()
    listed = set(re.findall(r"([\w/-]+\.md)$", text.partition("\nnav:")[2], re.M))
    made = set(re.findall(r'^    "[^"]+": "([^"]+\.md)",$', (SITE / "hooks.py").read_text(), re.M))
    assert made >= {"changelog.md", "contributing.md", "optimizers/index.md"}
    own = {path.relative_to(DOCS).as_posix() for path in RUN}
    assert listed == own | (made - {"optimizers/index.md"})


@cache
def anchors(path: Path) -> set[str]:
    """Of the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", path.read_text(), flags=re.M | re.S)
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (path.parent / file).resolve() if file else path
        if target.parent == DOCS / "optimizers":  # which the build makes
            lost += [link] * (target.name not in MADE)
        elif not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_every_public_name_has_a_place() -> None:
    shown = set(re.findall(r"^::: triton_optim\.(\w+)", "\n".join(path.read_text() for path in PAGES), re.M))
    made = {cls.__name__ for cls in optimizers().values()} | {*wrappers()}
    torchs = {name for name in torch.optim.__all__ if getattr(triton_optim, name, None) is getattr(torch.optim, name)}
    assert {*triton_optim.__all__} - shown - made == torchs


def test_every_message_of_troubleshooting_is_one_of_ours() -> None:
    said = []
    for folder in (Path(triton_optim.__file__).parent, Path(next(iter(kernels.__path__)))):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                said.append("".join(str(part.value) for part in parts if isinstance(part, ast.Constant)))
    quoted = re.findall(r"^### `(.*)`$", (DOCS / "guides" / "troubleshooting.md").read_text(), re.M)
    assert len(quoted) > 30
    assert [fragment for fragment in quoted if not any(fragment in text for text in said)] == []


def test_readme_is_short_and_begins_with_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 150
    first, second = re.findall(r"^```sh\n(pip install -e .* && .*)\n```", readme, re.M)  # .ci/run takes them from here
    assert "demo" in first
    assert "pytest" in second
    assert readme.index(second) < readme.index("```python")
