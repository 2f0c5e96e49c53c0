"""The package's docstrings as Markdown: they are written with Sphinx's roles. An extension of griffe."""

from __future__ import annotations

import re
from textwrap import dedent, indent
from typing import Any

import griffe

import triton_optim
from triton_optim.spec import Update

# The directive, what stands beside it, and the lines that are indented more.
MATHS = re.compile(r"^( *)\.\. math::(.*)\n((?:\1 +\S.*(?:\n|\Z)|\n(?=\1 +\S))*)", re.M)
ROLE = re.compile(r":(?:class|meth|func|attr|mod|data):`([^`]+)`")
HEADINGS = {"Class attributes:": "Attributes:", "Example:": "Examples:"}
OPTIMIZER, UPDATE = "triton_optim.RuleOptimizer", "triton_optim.spec.Update"
OPTIONS = "triton_optim.options.Options"
METHODS = [name for name, value in vars(Update).items() if callable(value) and name[0] != "_"]
# What a role may name that has a place in the reference.
PLACES = {
    **{name: f"triton_optim.{name}" for name in triton_optim.__all__},
    **{
        f"RuleOptimizer.{name}": f"{OPTIMIZER}.{name}"
        for name in ("averaged_parameters", "warmup", "push_hyperparameters")
    },
    "Update": UPDATE,
    **{f"Update.{name}": f"{UPDATE}.{name}" for name in METHODS},
}


def maths(match: re.Match[str]) -> str:
    """Lines of maths between signs that Markdown knows."""
    lines = f"{match[2].strip()}\n{dedent(match[3])}".strip()
    return indent(f"\n$$\n{lines}\n$$\n\n", match[1])


def reference(match: re.Match[str]) -> str:
    """A link where there is something to show, else the name."""
    name = match[1].removeprefix("triton_optim.").removeprefix("spec.")
    place = PLACES.get(name) or PLACES.get(f"Update.{name}")
    return f"[`{name}`][{place}]" if place else f"`{name}`"


def markdown(text: str) -> str:
    """A docstring in Markdown."""
    text = MATHS.sub(maths, text)
    text = re.sub(r":math:`([^`]+)`", lambda match: f"${' '.join(match[1].split())}$", text)
    text = ROLE.sub(reference, text)
    text = re.sub(r"^Source: ", "**Source.** ", text, flags=re.M)
    text = re.sub(r"^For: .*?(\n\n|\Z)", "", text, flags=re.M | re.S)  # stands at the head of the page
    for ours, theirs in HEADINGS.items():
        text = re.sub(rf"^( *){ours}$", rf"\1{theirs}", text, flags=re.M)
    return text


class Docstrings(griffe.Extension):
    """Writes every docstring anew before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called with whatever was found in the sources."""
        if obj.docstring:
            text = obj.docstring.value
            if obj.path == OPTIONS:  # a line each, which constructors repeat
                head, _, lines = text.partition("\n\n")
                text = f"{head}\n\nAttributes:\n{indent(lines, '    ')}"
            obj.docstring.value = markdown(text)
