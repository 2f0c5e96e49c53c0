"""``triton-optim list``: the optimizers and wrappers, what they keep and move, and when to use them."""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from ..catalog import ABOUT, KINDS, SIDE, Entry, entries
from ..core.optimizer import RuleOptimizer
from ..optimizers.adam import AdamW
from ..options import OPTIONS
from ..race.settings import SETTINGS
from ..registry import optimizers, wrappers
from ..util.table import table

WRAPPER = "wrapper"
HEADER = ("optimizer", "kind", "state", "step", "paper")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("name", nargs="?", help="of one: its arguments, states, options and an example")
    meanings = "; ".join(f"{kind}: {words}" for kind, words in KINDS.items())
    add("--kind", choices=[*KINDS, WRAPPER], metavar="KIND", help=f"only those of a kind ({meanings}; {WRAPPER})")
    add("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Print all, those of a kind, or one; 1 if there is none of that name."""
    try:
        found = chosen(args.name, args.kind)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps([entry.as_dict() for entry in found], indent=1))
    elif args.name is not None:
        print(details(found[0]))
    else:
        print(listed(found, shutil.get_terminal_size((120, 24)).columns))
    return 0


def chosen(name: str | None, kind: str | None) -> list[Entry]:
    """The entries that are asked for.

    Raises:
        ValueError: there is none of that name, or both are given.
    """
    found = entries()
    if name is None:
        return [e for e in found if kind is None or kind in e.kinds or (e.wrapper and kind == WRAPPER)]
    if kind is not None:
        raise ValueError(f"--kind {kind} chooses from the list, and {name} is one of it. Give one of the two.")
    known = {e.name.lower(): e for e in found}
    if name.lower() not in known:
        near = [known[one].name for one in get_close_matches(name.lower(), known)]
        fix = f"Did you mean {' or '.join(near)}?" if near else "`triton-optim list` has their names."
        raise ValueError(f"{name}: there is no optimizer or wrapper of that name. {fix}")
    return [known[name.lower()]]


def listed(found: Sequence[Entry], width: int) -> str:
    """A row each, and under it what it is for; at the end what the columns mean."""
    rows = [(e.name, e.kind, e.state, e.step, e.paper) for e in found]
    head, rule, *lines = table(HEADER, rows).splitlines()
    uses = [fill(f"    {e.use}", "    ", min(max(width, 60), 120)) for e in found]
    pairs = [part for line, use in zip(lines, uses, strict=True) for part in (line, use)]
    return "\n".join([head, rule, *pairs, "", ABOUT])


def details(e: Entry) -> str:
    """All that is known of one."""
    thing: Any = wrappers()[e.name] if e.wrapper else optimizers()[e.name.lower()]
    rows = {
        "for": e.use,
        "paper": " ".join(filter(None, (e.paper, e.url))),
        "kind": f"{e.kind} (a wrapper, here around AdamW)" if e.wrapper else e.kind,
        "state": f"{e.state} bytes an element: {states(e, thing)}" if e.states else "none",
        "step": f"{e.moved:.3g} bytes an element, {e.beside_adamw:.2g} x AdamW's" if e.moved else "up to the model",
        "products": f"{e.products:,.0f} multiplications and additions an element" if e.products else "",
        "launches": "up to the model" if e.launches is None else f"{e.launches} a step",
        "arguments": ", ".join(map(str, own_arguments(thing))),
        "tuned": tuned(e.name),
    }
    if takes_options(thing):
        rows["options"] = f"{', '.join(OPTIONS)}; help(triton_optim.Options) says more"
    lines = [fill(f"{label:<11}{value}", " " * 11) for label, value in rows.items() if value]
    example = (inspect.getdoc(thing) or "").partition("Example:\n")[2].partition("\n\n")[0]
    parts = (e.name, *lines, *(("", example, "") if example else ("",)), f"help(triton_optim.{e.name}) has the maths.")
    return "\n".join(parts)


def tuned(name: str) -> str:
    """The settings that a benchmark or paper published."""
    found = SETTINGS.get(name.lower())
    if found is None:
        return ""
    words = ", ".join(f"{key}={value}" for key, value in {"lr": found.lr, **found.options}.items())
    return f"{words}: {found.source}"


def fill(text: str, indent: str, width: int = 110) -> str:
    """Text in lines of that width, all but the first indented; links stay whole."""
    return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def takes_options(thing: Any) -> bool:
    """Whether it is the class of an optimizer with a rule."""
    return isinstance(thing, type) and issubclass(thing, RuleOptimizer)


def own_arguments(thing: Any) -> list[inspect.Parameter]:
    """The arguments of a class or wrapper, without the options that all have, and without annotations."""
    hidden = OPTIONS if takes_options(thing) else {}
    given = inspect.signature(thing).parameters.values()
    return [p.replace(annotation=inspect.Parameter.empty) for p in given if p.name not in hidden]


def states(e: Entry, thing: Any) -> str:
    """The states with their bytes, and what is declared of them."""
    cls: Any = thing(AdamW) if e.wrapper else thing
    declared = {**getattr(cls, "declared", {}), **{state.name: state for state in getattr(cls, "kept_states", ())}}
    said = []
    for name, size in e.states.items():
        state = declared.get(name)
        words = ["a number" if size * SIDE**2 <= 8 else f"{size:.2g}" if size < 100 else f"{size:.0f}"]
        if state is not None:
            words += ["never negative"] * state.nonnegative + ["never quantized"] * (not state.quantized)
        said.append(f"{name} ({', '.join(words)})")
    return ", ".join(said)
