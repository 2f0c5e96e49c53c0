"""C++ sources compiled into libraries, and kept on disk by what they are made of.

torch's own builders take longer to import than a first step may take (0.3 and 2.5 s), so the compiler is started here.
A library is written beside its place and renamed into it: processes that build the same one at once do not meet, and
none that has one loaded sees it change. It ends with a digest of itself: a damaged one, which could crash the process
that loads it, is built again.

A build may begin before its library is wanted (:func:`begin`): then who wants it waits for what is left.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

from ..dispatch import cxx_compiler

CACHE_VARIABLE = "TRITON_OPTIM_CACHE_DIR"
TIME_LIMIT = 60.0  # seconds; a library takes a fraction of one

# Threads of OpenMP are torch's own: its library is loaded already, and is found by its name. The loops of a block, of
# known length, are not unrolled: that took three times as long to compile.
# Integers wrap, as they do in torch and Triton. Neither errno nor the processor's exception flags are read by anyone;
# with them, no loop with a root or a comparison is made of vectors. Products and sums are not contracted: so that a
# step is, bit for bit, the eager one but for its roots, and as the loops wait for memory there is nothing to be won.
FLAGS = (
    "-std=c++17",
    "-O3",
    "--param=max-completely-peel-times=4",
    "-march=native",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-fno-exceptions",  # what throws none would ask C++'s own library for what catches them
    "-fwrapv",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    # What an element waits for, roots above all, is started before what need not wait.
    "-fschedule-insns",
    "-fsched-pressure",
    # Without being asked, GCC leaves half of the longest vectors of a processor unused, which clock it down a little.
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
)

# Where the compiler is g++. These passes find nothing in such loops, and would make each build longer. Without being
# asked, it links C++'s own library, too, which nothing uses, and to read that takes half as long as to compile. C's is
# in every process; to read it takes as long as the rest.
OF_GCC = (
    *(
        f"-fno-{name}"
        for name in (
            "asynchronous-unwind-tables",
            "caller-saves",
            "code-hoisting",
            "crossjumping",
            "gcse",
            "ipa-cp",
            "peel-loops",
            "split-loops",
            "thread-jumps",
            "tree-loop-distribute-patterns",
            "tree-pre",
            "tree-slp-vectorize",
            "tree-vrp",
            "unswitch-loops",
        )
    ),
    "-pipe",
    "-nostdlib",
    "-lgomp",
    "-lm",
    "-lgcc",
)


class BuildError(Exception):
    """There is no library, and why."""


# What failed in this process is not tried again: by compiler where it hung, else by what was to be built.
_failed: dict[str, str] = {}


def folder() -> Path:
    """Where libraries are kept: ``$TRITON_OPTIM_CACHE_DIR``, else a folder of the user's cache.

    Raises:
        BuildError: the user has no home directory.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triton_optim"
    except RuntimeError as error:
        raise BuildError(f"libraries cannot be kept: there is no home directory; set {CACHE_VARIABLE}") from error


@cache
def processor() -> str:
    """What code for this processor depends on."""
    try:
        with open("/proc/cpuinfo") as file:  # of its many processors the first is enough
            lines = iter(file.readline, "\n")
            return "".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU ")))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


# Compilers at work.
_running: set[subprocess.Popen[str]] = set()


def stop() -> None:
    """End the compilers that other threads wait for."""
    for compiler in list(_running):
        end(compiler)


def end(compiler: subprocess.Popen[str]) -> None:
    """End a compiler that has not ended, with the programs that it has started."""
    with suppress(ProcessLookupError):  # the thread that waits for it may have seen its end by now
        if compiler.poll() is None:
            os.killpg(compiler.pid, signal.SIGKILL)


def run(command: list[str], temporary: str | None = None) -> str:
    """Run a compiler; what it prints.

    Args:
        command: the compiler and its arguments.
        temporary: the folder for its temporary files, which it leaves if it is killed; None for the system's.

    Raises:
        BuildError: it is missing, takes too long, or fails.
    """
    what, pipe = command[0], subprocess.PIPE
    own = None if temporary is None else {**os.environ, "TMPDIR": temporary}
    try:
        # A session of its own: what ends it ends the programs that it starts, and they do not see Ctrl-C.
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            text=True,
            errors="replace",
            env=own,
            start_new_session=True,
        )
    except OSError as error:
        raise BuildError(f"{what} cannot be started ({error})") from error
    _running.add(started)
    with started:
        try:
            out, errors = started.communicate(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired as error:
            _failed[what] = f"{what} did not end within {TIME_LIMIT:g} s"
            raise BuildError(_failed[what]) from error
        finally:
            _running.discard(started)
            end(started)
    if started.returncode:
        said = (errors or out).strip().splitlines()
        raise BuildError(f"{what} failed ({started.returncode}): {said[0] if said else 'it says nothing'}")
    return out


def own_flags(compiler: str, flags: tuple[str, ...]) -> tuple[str, ...]:
    """The options of :data:`OF_GCC`, where they go with these."""
    names = (Path(compiler).name, Path(compiler).resolve().name)
    return OF_GCC if flags is FLAGS and any(re.search(r"(^|-)g\+\+", name) for name in names) else ()


def stamp(compiler: str) -> str:
    """What tells a compiler from the next one in its place. To ask for its version takes longer than to load a library
    that is kept.
    """
    place = Path(compiler).resolve()
    found = place.stat()
    return f"{place} {found.st_size} {found.st_mtime_ns}"


# The sources of libraries that were to begin, and what builds those that did, by their places.
_asked: set[tuple[str, tuple[str, ...]]] = set()
_begun: dict[Path, threading.Thread] = {}


def begin(source: str, flags: tuple[str, ...] = FLAGS) -> None:
    """Build a library beside what goes on, unless it is kept or was begun before: :func:`library` waits for it."""
    if (source, flags) in _asked:  # to look for it on disk takes as long as to make an optimizer
        return
    _asked.add((source, flags))
    try:
        compiler, place = library_place(source, flags)
    except BuildError:
        return
    if str(place) in _failed or place in _begun or is_whole(place):
        return
    if not _begun:
        atexit.register(_end)
    thread = threading.Thread(
        target=_build_begun, args=(source, flags, compiler, place), daemon=True, name="triton_optim.util.cpp_build"
    )
    thread.start()
    _begun[place] = thread


def _build_begun(source: str, flags: tuple[str, ...], compiler: str, place: Path) -> None:
    try:
        build(source, flags, compiler, place)
    except BuildError as error:
        _failed[str(place)] = str(error)


def _end() -> None:
    """End what was begun, and wait until nothing of it is left on disk."""
    stop()
    for thread in _begun.values():
        thread.join(1.0)


def library(source: str, flags: tuple[str, ...] = FLAGS, kind: type[ctypes.CDLL] = ctypes.CDLL) -> ctypes.CDLL:
    """The library of a C++ source, built unless it is kept.

    Args:
        source: the text.
        flags: the compiler's options.
        kind: ``ctypes.PyDLL`` where calls must not let other threads run Python meanwhile.

    Raises:
        BuildError: there is no compiler, it hangs or fails, or the library cannot be kept or loaded.
    """
    compiler, place = library_place(source, flags)
    if place in _begun:
        _begun[place].join()
    if str(place) in _failed:
        raise BuildError(_failed[str(place)])
    try:
        if not is_whole(place):
            build(source, flags, compiler, place)
        return kind(str(place))
    except (BuildError, OSError) as error:
        _failed[str(place)] = str(error)
        raise BuildError(str(error)) from error


def is_built(source: str, flags: tuple[str, ...] = FLAGS) -> bool:
    """Whether the library of a C++ source is kept already."""
    try:
        return is_whole(library_place(source, flags)[1])
    except BuildError:
        return False


def library_place(source: str, flags: tuple[str, ...]) -> tuple[str, Path]:
    """The compiler of a library, and the file that it is kept in."""
    compiler = cxx_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found")
    if compiler in _failed:
        raise BuildError(_failed[compiler])
    try:
        options = (*flags, *own_flags(compiler, flags))
        made_of = "\0".join((source, *options, compiler, stamp(compiler), processor(), sys.platform))
    except OSError as error:
        raise BuildError(f"{compiler} cannot be read ({error})") from error
    return compiler, folder() / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.so"


def is_whole(place: Path) -> bool:
    """Whether there is a library that ends with its digest."""
    try:
        content = place.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def build(source: str, flags: tuple[str, ...], compiler: str, place: Path) -> None:
    """Compile a source into a library."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as own:
            text, made = Path(own, "kernel.cpp"), Path(own, "kernel.so")
            text.write_text(source)
            run([compiler, str(text), *flags, *own_flags(compiler, flags), "-o", str(made)], own)
            content = made.read_bytes()
            made.write_bytes(content + hashlib.sha256(content).digest())
            made.replace(place)
    except OSError as error:
        raise BuildError(f"libraries cannot be kept in {place.parent} ({error}); set {CACHE_VARIABLE}") from error
