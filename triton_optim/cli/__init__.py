"""The command line: ``triton-optim`` and ``python -m triton_optim``."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

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
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in COMMANDS.items():
        # Imported here: a command may need what the core does without.
        module = importlib.import_module(f".{name}", __package__)
        own = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(own)
        own.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    status: int = parsed.run(parsed)
    return status
