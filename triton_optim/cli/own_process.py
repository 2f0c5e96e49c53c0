"""Checks in a process of their own: a setting of Triton, a crash or a hang there does the command no harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class ProcessError(Exception):
    """The process failed or took too long. The message says why and how to run it alone.

    Attributes:
        error: the last line of what went wrong.
        printed: the JSON objects that it printed before.
    """

    def __init__(self, message: str, error: str, printed: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.error, self.printed = error, printed


def run_module(
    what: str, module: str, arguments: Sequence[str], variables: Mapping[str, str], timeout: float
) -> list[dict[str, Any]]:
    """Run ``python -m module`` and return the JSON objects it printed, one a line.

    Args:
        what: the check's name, for messages.
        module: of triton_optim.cli.
        arguments: of the module.
        variables: added to the environment; TRITON_INTERPRET is not inherited.
        timeout: seconds after which it is stopped.

    Raises:
        ProcessError: it ended with an error, or was still running after `timeout`.
    """
    command = [sys.executable, "-m", f"{__package__}.{module}", *arguments]
    alone = " ".join([*(f"{name}={value}" for name, value in variables.items()), *command])
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with subprocess.Popen(
        command, env=inherited | dict(variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            error = f"stopped after {timeout:g} s: the machine is busy or a kernel hangs"
            raise ProcessError(f"{what} was {error}. Run it alone: {alone}", error, objects(out)) from None
    if process.returncode != 0:
        error = (errors.strip() or "no message").splitlines()[-1]
        code = f"exit code {process.returncode}"
        message = f"{what} ended with {code}: {error}. For the whole message: {alone}"
        raise ProcessError(message, f"{error} ({code})", objects(out))
    return objects(out)


def objects(out: str) -> list[dict[str, Any]]:
    """The JSON objects among the lines. Compilers may print others."""
    return [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
