"""What Triton's first compilation in a process waits for, done beside the program from the time an optimizer is made.

Triton hashes its own library, which is hundreds of megabytes, into the name of all that it keeps on disk, and imports a
second language. Neither depends on what is compiled, both leave the interpreter to other threads for most of their
time, and between the making of an optimizer and its first step lies a forward and a backward pass.
"""

from __future__ import annotations

import importlib
import threading
from contextlib import suppress

_thread: threading.Thread | None = None


def start() -> None:
    """Begin, if that was not done yet."""
    global _thread
    if _thread is None:
        _thread = threading.Thread(target=_run, daemon=True, name="triton_optim.backends.triton.compile_ahead")
        _thread.start()


def wait() -> None:
    """Wait until it is done, so that no compilation does it again beside it."""
    if _thread is not None:
        _thread.join()


def _run() -> None:
    # What a version of Triton has not, or does another way, its first compilation does.
    with suppress(Exception):
        importlib.import_module("triton.runtime.cache").triton_key()
    with suppress(Exception):
        importlib.import_module("triton.experimental.gluon.nvidia.hopper")
