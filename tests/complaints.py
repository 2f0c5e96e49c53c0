"""What an error must say, and what it must leave as it was."""

import copy
import re

import pytest
import torch
from side_by_side import values


def raised_by(action):
    with pytest.raises(Exception) as error:  # noqa: PT011 (which one is the question)
        action()
    assert not isinstance(error.value, Warning)  # these are errors here
    return error.type


# How a fix begins: it says what to do, what may be given, or what was meant. No complaint does.
FIXES = (
    "add|assign|build|call|capture|check|choose|clear|convert|create|decorate|define|delete|dequantize|end|find|give|"
    "install|keep|leave|let|load|look|make|move|name|pass|pip|put|remove|rename|return|run|set|take|teach|tell|try|tune|"
    "unset|use|write|"
    "it must|they must|it takes|it has|the default is|what fits|did you mean|for a single matrix|modules are looked for"
)
FIX = re.compile(rf"(?:(?<=[.:;)] )|(?<=, or ))(?:{FIXES})\b", re.IGNORECASE)


def explains(error, *parts):
    """The value and the cause (each of `parts` is in the message), and after them a fix."""
    message = str(error.value)
    missing = [part for part in parts if str(part) not in message]
    assert not missing, f"{missing} not in: {message}"
    assert FIX.search(message), f"no fix in: {message}"


class Unchanged:
    """A context in which parameters, gradients, states and groups must stay as they are, bit for bit."""

    def __init__(self, opt):
        self.opt = opt

    def look(self):
        params = [p for group in self.opt.param_groups for p in group["params"]]
        grads = [None if p.grad is None else p.grad.detach().to_dense() for p in params]
        states = self.opt.state_dict()["state"]
        groups = [
            {k: list(v.encode()) if isinstance(v, str) else v for k, v in group.items() if k != "params"}
            for group in self.opt.param_groups
        ]
        ids = [[id(p) for p in group["params"]] for group in self.opt.param_groups]
        return copy.deepcopy((values(params), grads, states, groups, ids))

    def __enter__(self):
        self.before = self.look()

    def __exit__(self, exception, *_):
        if exception is None:
            return  # left for pytest.raises to report
        torch.testing.assert_close(self.look(), self.before, rtol=0, atol=0)
