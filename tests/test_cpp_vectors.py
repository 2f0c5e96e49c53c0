"""The loop that the C++ backend makes of a rule is one of vectors: else it computes an element at a time."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPP
from table import CASES, Case, rows

from triton_optim.backends.cpp import bucket
from triton_optim.dispatch import cxx_compiler
from triton_optim.util import cpp_build

pytestmark = CPP
# A loop over a block; and one that is compiled for strips of a chunk and for what is left of it.
LOOP = re.compile(r" for \(int64_t i = (0|start); i < (stop|\d+); \+\+i\)")


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is to be compiled; nothing is."""
    found: list[str] = []
    monkeypatch.setattr(bucket, "step_in", found.append)
    for made in (bucket.step_of, bucket.measure_of):
        made.cache_clear()
    yield found
    for made in (bucket.step_of, bucket.measure_of):
        made.cache_clear()  # of what was not compiled


def scalar_loops(source: str, compiler: str, folder: Path) -> list[str]:
    """The loops over elements of which the compiler made no vectors, in the function that a rule became."""
    place = folder / "rule.cpp"
    place.write_text(source)
    flags = [*cpp_build.FLAGS, *cpp_build.own_flags(compiler, cpp_build.FLAGS)]
    command = [compiler, str(place), *flags, "-fopt-info-vec", "-o", str(folder / "rule.so")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"rule\.cpp:(\d+):\d+: optimized: loop vectorized using (\d+) byte", said)
    widest = max((int(width) for _, width in found), default=0)
    vectors = [int(line) for line, width in found if int(width) == widest]
    lines = source.splitlines()
    start = next(i for i, line in enumerate(lines) if "void update(UPDATE_PARAMETERS)" in line)
    loops = {i: match for i in range(start, len(lines)) if (match := LOOP.search(lines[i]))}
    assert loops
    return [lines[i] for i, match in loops.items() if sum(map(vectors.count, (i + 1, i + 2))) < 1 + (match[1] != "0")]


@rows(*(case for case in CASES if case.elementwise and not case.sparse))
def test_the_loop_of_a_rule_is_made_of_vectors(case: Case, sources: list[str], tmp_path: Path) -> None:
    compiler = cxx_compiler()
    assert compiler is not None
    if "Free Software Foundation" not in subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout:
        pytest.skip("only GCC says of which loops it made vectors")
    for options in case.variants.values():
        param = torch.zeros(8, requires_grad=True)
        param.grad = torch.zeros(8)
        settings: dict[str, Any] = case.settings | options
        case.ours([param], **settings, backend="cpp").warmup()
    assert [loop for source in dict.fromkeys(sources) for loop in scalar_loops(source, compiler, tmp_path)] == []
