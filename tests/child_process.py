"""Tests with the mark ``compiled`` run in a child pytest process for each file, in which Triton's interpreter is off.

Triton decides at import whether kernels are compiled or interpreted, so one process cannot test both. The child is told
one test at a time, and its reports are handed on as if the test had run here. ``TRITON_INTERPRET=0 pytest -n0 FILE``
runs the tests of a file without a child.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

PIPE = "TRITON_OPTIM_TESTS_PIPE"  # the child's end, a file descriptor
OWN = ("--write-costs",)  # options of these tests
COMPILES = os.environ.get("TRITON_INTERPRET") == "0"  # whether this process runs the tests itself


class Child:
    """A pytest process that runs tests of one file as it is told.

    Args:
        item: its first test.
    """

    def __init__(self, item: pytest.Item) -> None:
        config, options = item.config, item.config.option
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        shown = options.capture == "no"
        command = [sys.executable, "-m", "pytest", str(item.path), "-n0", "-p", "no:cacheprovider"]
        command += [f"--rootdir={config.rootpath}", f"--tb={options.tbstyle}", f"--capture={options.capture}"]
        command += ["-c", str(config.inipath)] * bool(config.inipath) + ["-v"] * options.verbose
        command += ["--showlocals"] * options.showlocals + [
            word for word in OWN if word in config.invocation_params.args
        ]
        if options.timeout is not None:
            command.append(f"--timeout={options.timeout}")
        self.pipe, theirs = Pipe()
        environment = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", PIPE: str(theirs.fileno())}
        self.process = subprocess.Popen(
            command,
            env=os.environ | environment,
            cwd=config.invocation_params.dir,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=None if shown else self.output,
            stderr=None if shown else subprocess.STDOUT,
        )
        theirs.close()

    def run(self, item: pytest.Item, following: pytest.Item | None) -> Iterator[pytest.TestReport]:
        """The reports of a test, as they come in.

        Args:
            following: the test of this file that runs next; None ends the child's fixtures.
        """
        try:
            self.pipe.send((item.nodeid, following and following.nodeid))
            while (data := self.pipe.recv()) is not None:
                yield item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
            return
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.wait()
        why = f"The child process that ran this test ended with code {self.process.returncode}."
        self.output.seek(0)
        output = ("Output of the child process", self.output.read().decode(errors="replace"))
        yield pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call", [output])

    def end(self) -> None:
        """Let it finish."""
        self.pipe.close()
        self.process.wait()
        self.output.close()


CHILD = pytest.StashKey[Child]()


def runs_in_child(item: pytest.Item | None) -> bool:
    return not COMPILES and item is not None and item.get_closest_marker("compiled") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in filter(runs_in_child, items):
        item.add_marker(pytest.mark.timeout(0), append=False)  # the child counts the time


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not runs_in_child(item):
        return None
    stash = item.config.stash
    child = stash[CHILD] if CHILD in stash else stash.setdefault(CHILD, Child(item))
    following = nextitem if runs_in_child(nextitem) and nextitem.path == item.path else None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in child.run(item, following):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    if following is None or child.process.poll() is not None:
        end_child(item.config)
    return True


def end_child(config: pytest.Config) -> None:
    if CHILD in config.stash:
        config.stash[CHILD].end()
        del config.stash[CHILD]


def pytest_sessionfinish(session: pytest.Session) -> None:
    end_child(session.config)  # of a session that stopped early


class Runner:
    """What a child does: runs the tests that it is told of, and sends their reports."""

    def __init__(self, config: pytest.Config, pipe: Connection) -> None:
        self.config, self.pipe = config, pipe

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        while items:  # else the file cannot be collected here: its errors are the output
            try:
                name, following = self.pipe.recv()
            except EOFError:
                break
            session.config.hook.pytest_runtest_protocol(item=items[name], nextitem=items.get(following))
            self.pipe.send(None)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.pipe.send(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


def pytest_configure(config: pytest.Config) -> None:
    if PIPE in os.environ:
        pipe = int(os.environ.pop(PIPE))
        os.set_inheritable(pipe, False)
        config.pluginmanager.register(Runner(config, Connection(pipe)))
