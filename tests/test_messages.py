"""Every error of the package says what to do."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
from complaints import FIX, explains

import triton_optim
from triton_optim import kernels


@pytest.mark.parametrize(
    "complaint",
    [
        "Invalid learning rate: -1.0.",
        "exp_avg of parameter 0: shape (4, 2) does not match: (4, 3).",
        "AdamW does not support sparse gradients here: no rows are taken; the gradient of parameter 0 is sparse.",
    ],
)
def test_a_complaint_is_no_fix(complaint):
    with pytest.raises(AssertionError, match="no fix"):
        explains(SimpleNamespace(value=complaint))
    explains(SimpleNamespace(value=f"{complaint} Leave it out."))


# What no user sees, or sees as a part of another message, which has the fix.
INSIDE = {"Unavailable", "Unrecorded", "UntranslatableError", "BuildError", "ProcessError", "NotImplementedError"}
# What is raised in a process of its own, whose caller knows what to do; and to who works on the audit.
CALLERS = {"launch_check", "assembly", "graph"}
# What another's words are in: what to do, or the error of what a user wrote.
OTHERS = {"remedy", "refusal", "cause_of", "fix", "ALLOWED"}


def text_of(node, known):
    """A message, with {} for each value in it, and the text of a constant for its name."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, known)
    if isinstance(node, ast.Name):
        return known.get(node.id, "{}")
    return "{}"


def has_others_words(message):
    return bool(OTHERS & {node.id for node in ast.walk(message) if isinstance(node, ast.Name)})


def constants(tree):
    """The texts that a module has names for."""
    return {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def messages():
    """Each error that the package raises, with its place."""
    package = Path(triton_optim.__file__).parent
    rules = Path(kernels.__path__[0])
    trees = {path: ast.parse(path.read_text()) for path in sorted({*package.rglob("*.py"), *rules.rglob("*.py")})}
    shared = {name: text for tree in trees.values() for name, text in constants(tree).items()}
    for path, tree in trees.items():
        known = shared | constants(tree)
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            name = ast.unparse(node.exc.func).rpartition(".")[2]
            message = node.exc.args[0]
            if name in INSIDE or path.stem in CALLERS or not isinstance(message, (ast.Constant, ast.JoinedStr)):
                continue
            text = text_of(message, known)
            if " " in text and not has_others_words(message):  # one word is no message
                yield f"{path.name}:{node.lineno}", text


def test_every_message_has_a_fix():
    found = dict(messages())
    assert len(found) > 100
    without = [f"{place}: {message}" for place, message in found.items() if not FIX.search(message)]
    assert not without, "\n".join(without)
