"""The command line: ``triton-optim`` and ``python -m triton_optim``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from ..util.provenance import installed_version

COMMANDS = {
    "doctor": "what is installed, whether a Triton launch works, and which backend each device and dtype gets, and why",
    "demo": "train a small network on real data with torch's AdamW and with ours, and compare",
    "race": "let optimizers and schedules race on a task, from the same weights, and see which does best how fast",
    "list": "the optimizers and wrappers: what each keeps and moves, its paper, and when to use it",
    "memory": "what a model of a size would keep in memory, with which optimizer and options",
    "bench": "how long a step takes on a model, beside torch's and others' optimizers, once their results agree",
    "audit": "compile every rule for GPUs that need not be here, and check registers, traffic and access width",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(prog="triton-optim", description="Optimizers for PyTorch as Triton functions.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {installed_version('triton-optim')}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in COMMANDS.items():
        # Imported here: a command may need what the core does without.
        module = importlib.import_module(f".{name}", __package__)
        own = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(own)
        own.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:  # its reader, such as `head`, has read enough; what Python flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"\n{parser.prog} {parsed.command} was interrupted.", file=sys.stderr)
        return 130  # as shells count it
    return status
