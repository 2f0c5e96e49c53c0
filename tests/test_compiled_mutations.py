"""Kernels that are made wrong on purpose: executed, each must be found out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is what compiles the kernels")
from compiled_steps import Training, differing, executing, unfused
from ptx_machine.executor import Executor
from ptx_machine.global_memory import Span

import triton_optim
from triton_optim import dispatch
from triton_optim.backends.norms import partial_norms
from triton_optim.backends.triton import bucket as triton_backend
from triton_optim.backends.triton.stub_driver import Launched
from triton_optim.buckets.gradient_norm import Norm
from triton_optim.kernels import multi_tensor

pytestmark = pytest.mark.compiled

ADAMW = Training(triton_optim.AdamW, {}, numels=(1027,), steps=1)


@pytest.fixture
def machine() -> Iterator[Executor]:
    with executing() as executor:
        yield executor


Mutate = Callable[[str, str], None]


@pytest.fixture
def mutate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mutate:
    """Let the backend launch a copy of the kernel in which a text is another."""

    def change(old: str, new: str) -> None:
        source = Path(inspect.getsourcefile(multi_tensor) or "").read_text()
        assert source.count(old) == 1, f"the kernel no longer has {old!r}"
        path = tmp_path / "mutated.py"
        path.write_text(source.replace(old, new))
        spec = spec_from_file_location("triton_optim.kernels.mutated", path)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(triton_backend, "kernel", module)

    return change


def kinds(machine: Executor) -> set[str]:
    """Of the faults so far."""
    return {fault.kind for fault in machine.take_faults()}


def test_an_unchanged_copy_has_no_fault(machine: Executor, mutate: Mutate) -> None:
    mutate("BLOCK = 1024", "BLOCK = 1024")
    ADAMW.run("triton")
    assert machine.launches == ["multi_tensor"]
    assert not kinds(machine)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("start + item * PER_ITEM[i] < numel,", "start + item * PER_ITEM[i] <= numel,"),
        ("if start + BLOCK <= numel:", "if start + BLOCK <= numel + 1021:"),
    ],
)
def test_a_mask_that_is_off(old: str, new: str, machine: Executor, mutate: Mutate) -> None:
    mutate(old, new)
    ADAMW.run("triton")
    assert "out of bounds" in kinds(machine)


def test_a_mask_that_leaves_out_the_last_element(machine: Executor, mutate: Mutate) -> None:
    mutate("start + item * PER_ITEM[i] < numel,", "start + item * PER_ITEM[i] < numel - 1,")
    with unfused():
        different = differing(ADAMW.run("triton"), ADAMW.eagerly())
    assert different == {"0.p": 1, "0.exp_avg": 1, "0.exp_avg_sq": 1}


def test_elements_of_two_programs(machine: Executor, mutate: Mutate) -> None:
    mutate("chunks + 2 * program + 1).to(tl.int64) * BLOCK", "chunks + 2 * program + 1).to(tl.int64) * (BLOCK - 4)")
    ADAMW.run("triton")
    assert "race" in kinds(machine)


def test_a_missing_barrier(machine: Executor) -> None:
    gradients = [torch.randn(5000)]
    partial_norms(gradients, Norm(2.0), "triton")
    assert not kinds(machine)

    def without_barriers(ptx: str) -> str:
        assert "bar.sync" in ptx
        return "".join(line for line in ptx.splitlines(keepends=True) if "bar.sync" not in line)

    machine.edit = without_barriers
    partial_norms(gradients, Norm(2.0), "triton")
    assert "race" in kinds(machine)


@pytest.mark.parametrize("wide", [True, False])
def test_an_offset_of_32_bits(wide: bool, machine: Executor, mutate: Mutate) -> None:
    """Beyond 2^31 elements, of tensors that are nowhere: addresses are all that is looked at."""
    if not wide:
        mutate("chunks + 2 * program + 1).to(tl.int64) * BLOCK", "chunks + 2 * program + 1) * BLOCK")
    p = torch.nn.Parameter(torch.zeros(1024))
    p.grad = torch.ones_like(p)
    optimizer = triton_optim.SGD([p], backend="triton")
    optimizer.step()
    (bucket,) = optimizer.engine.plan.buckets
    numel = 2**31 + 2048
    machine.spans = [Span(at, at + 4 * numel, name, absent=True) for at, name in ((1 << 45, "p"), (1 << 46, "g"))]
    bucket.chunks[0, 1] = numel // 1024 - 1
    bucket.tensors[0] = torch.tensor([numel, 0, 1 << 45])
    bucket.gradient_table[0] = 1 << 46
    assert not kinds(machine)
    optimizer.step()
    assert kinds(machine) == (set() if wide else {"out of bounds"})


def swapped(launch: Launched, a: str, b: str) -> Launched:
    """The launch, with the arguments of these names in each other's place."""
    values = launch.values()
    values[a], values[b] = values[b], values[a]
    return launch._replace(arguments=tuple(values.values()))


@pytest.mark.parametrize("names", [("tensors", "gradients"), ("chunks", "tensors")], ids=str)
def test_arguments_in_the_wrong_order(
    names: tuple[str, str], machine: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(given: Launched) -> None:
        machine(swapped(given, *names))

    monkeypatch.setattr(dispatch.stub_driver, "on_launch", launch)
    ADAMW.run("triton")
    assert "out of bounds" in kinds(machine)


def test_scalars_in_the_wrong_order(machine: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """No access tells of it: the results do."""

    def launch(given: Launched) -> None:
        values = given.values()
        machine(given._replace(arguments=tuple((values | {"rows": values["rows"][::-1]}).values())))

    monkeypatch.setattr(dispatch.stub_driver, "on_launch", launch)
    with unfused():
        assert set(differing(ADAMW.run("triton"), ADAMW.eagerly())) == {"0.p", "0.exp_avg", "0.exp_avg_sq"}


def test_accesses_of_128_bits_to_misaligned_addresses(machine: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher_for = triton_backend.launcher_for

    def aligned(key: Any, *given: Any) -> Any:
        return launcher_for(key._replace(aligned=True), *given)

    misaligned = ADAMW._replace(offset=1)
    misaligned.run("triton")
    assert not kinds(machine)
    monkeypatch.setattr(triton_backend, "launcher_for", aligned)
    misaligned.run("triton")
    assert "misaligned" in kinds(machine)


def test_a_value_that_nobody_wrote(machine: Executor) -> None:
    def without_a_product(ptx: str) -> str:
        lines = ptx.splitlines(keepends=True)
        del lines[next(i for i, line in enumerate(lines) if "fma.rn.f32" in line)]
        return "".join(lines)

    machine.edit = without_a_product
    ADAMW._replace(numels=(1031,)).run("triton")  # one of each four elements of a tail lacks it
    assert "uninitialised" in kinds(machine)
