"""What mkdocs does beside: a page an optimizer, pages of files outside of docs/, and maths without a script."""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from paths import RATES, STEPS, picture  # beside this file, where mkdocs looks

from triton_optim.catalog import Entry, entries

ROOT = Path(__file__).parents[2]
# Files of the repository that are pages or pictures here, too, and where.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "methodology.md",
    "benchmarks/RESULTS.md": "results.md",
    "examples/README.md": "examples.md",
    "triton_optim/optimizers/README.md": "optimizers/index.md",
    **{
        f"benchmarks/results/{path.name}": f"images/{path.name}" for path in (ROOT / "benchmarks/results").glob("*.svg")
    },
}
INSIDE = {page: path for path, page in OUTSIDE.items()}
PAGE = """\
# {name}

{use}

| | |
|---|---|
| kind | {kind} |
| state | {state} bytes an element{states} |
| step | {step} |
| paper | {paper} |

How state and step are counted stands [below the table of all](index.md). {also}

{picture}

::: triton_optim.{name}
    options:
      heading_level: 2
      members: [step, update_hessian, train, eval, d]
      inherited_members: [train, eval, d]
      show_source: true
"""
OPTIONS = "It takes [every option](../reference/options.md), and has [the methods of all](../reference/optimizer.md)."
MATHS = {
    "inline": re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S),
    "block": re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S),
}
PICTURE = f"""\
{STEPS} steps with the defaults, without decay (SGD with momentum 0.9), each at the best of {len(RATES)} learning rates,
which falls to 0; beside it the value at the end. This shows how a rule moves, not which is best: two numbers are no
model.
"""
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def page(e: Entry) -> str:
    """The page of an optimizer or a wrapper."""
    paper = f"[{e.paper}]({e.url})" if e.url else e.paper
    names = [f"`{name}`" for name in e.states if name != "all"]
    states = f": {', '.join(names)}" if names else ""
    step = "up to the model" if e.moved is None else f"{e.moved:.3g} bytes an element, {e.beside_adamw:.2g} x AdamW's"
    if e.products:
        step += f"; {e.products:,.0f} multiplications and additions an element"
    if e.launches is not None:
        step += f"; with Triton {e.launches} kernels or operations" if e.launches > 1 else "; one kernel with Triton"
    also = "It wraps [any optimizer](../guides/wrappers.md)." if e.wrapper else "" if e.moved is None else OPTIONS
    said = {"use": e.use.replace("``", "`"), "states": states, "step": step, "paper": paper, "also": also}
    shown = "" if e.wrapper else f"{picture(e.name)}\n\n{PICTURE}"
    return PAGE.format(name=e.name, kind=e.kind, state=e.state, picture=shown, **said)


def on_config(config: Any) -> Any:
    """Fill the navigation with the pages that are made here."""
    docs = Path(config.docs_dir)
    trainers = sorted(path.relative_to(docs).as_posix() for path in (docs / "trainers").glob("*.md"))
    found = entries()
    pages = {
        "Trainers": sorted(trainers, key=lambda path: (path != "trainers/index.md", path)),
        "Optimizers": [
            "optimizers/index.md",
            *(f"optimizers/{e.name.lower()}.md" for e in found if not e.wrapper),
            {"Wrappers": [f"optimizers/{e.name.lower()}.md" for e in found if e.wrapper]},
        ],
    }
    for item in config.nav:
        for title in pages.keys() & item.keys():
            item[title] = pages[title]
    config.nav = [item for item in config.nav if [*item.values()] != [[]]]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside of docs/, and a page an optimizer."""
    for path, place in OUTSIDE.items():
        if path.endswith(".svg"):
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
        else:
            files.append(File.generated(config, place, content=(ROOT / path).read_text()))
    for e in entries():
        files.append(File.generated(config, f"optimizers/{e.name.lower()}.md", content=page(e)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files outside of docs/ into links to their pages."""
    own = page.file.src_uri
    place = INSIDE.get(own, f"docs/{own}")  # in the repository
    if own == "optimizers/index.md":
        page.meta["hide"] = ["toc"]  # the table takes the room
        markdown = re.sub(r"^\| `(\w+)` ", lambda m: f"| [`{m[1]}`]({m[1].lower()}.md) ", markdown, flags=re.M)

    def there(match: re.Match[str]) -> str:
        """The link as it is here."""
        if ":" in match[2] or (own == "optimizers/index.md" and "/" not in match[2]):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), match[2]))
        site = OUTSIDE.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        return (
            match[0]
            if site is None
            else f"{match[1]}{posixpath.relpath(site, posixpath.dirname(own) or '.')}{match[3]}"
        )

    return LINK.sub(there, markdown)


def on_page_content(text: str, page: Any, config: Any, files: Files) -> str:
    """Turn maths into MathML, which browsers show without a script or a font of ours."""
    for display, pattern in MATHS.items():
        text = pattern.sub(lambda match, display=display: mathml(match[1], display), text)
    return text


def mathml(latex: str, display: str) -> str:
    """MathML of LaTeX, whose lines may be aligned.

    Raises:
        ValueError: a command of LaTeX is not known.
    """
    latex = " ".join(html.unescape(latex).split())
    latex = re.sub(r"\\Big([lr])", lambda match: {"l": r"\left", "r": r"\right"}[match[1]], latex)  # unknown to it
    if "&=" in latex:
        latex = rf"\begin{{split}}{latex}\end{{split}}"
    found = convert(latex, display=display).replace(r"\_", "_")
    if "\\" in re.sub(r"&#x0005C;", "", re.sub(r"<[^>]*>", "", found)):
        raise ValueError(f"maths that latex2mathml does not know: {latex}")
    return found if display == "inline" else f'<div class="maths">{found}</div>'
