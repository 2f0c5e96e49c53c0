"""Every step through Triton's own launch, for a GPU that is not there; see child_process.py and stub_launches.py."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterator
from math import ceil, inf
from typing import Any

import costs
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch
import triton
from steps import BF16, F32, Step, every_step
from stub_launches import BLOCK, Recorder, Seen, Spy, address, check_arguments, check_step, forget_kernels

from triton_optim import SGD, AdamW, RuleOptimizer
from triton_optim.backends.norms import partial_norms
from triton_optim.backends.triton import bucket as triton_backend
from triton_optim.backends.triton import stub_driver
from triton_optim.backends.triton.launch import Launcher
from triton_optim.buckets.gradient_norm import Norm
from triton_optim.kernels import gradient_norm, symmetric_product
from triton_optim.optimizers.matrix.symmetric_product import symmetric_product as product_of

pytestmark = pytest.mark.compiled

OF_34 = triton.__version__.startswith("3.4.")
needs_lld = pytest.mark.skipif(
    OF_34 and not os.environ.get("TRITON_HIP_LLD_PATH"),
    reason="Triton 3.4 links for AMD with ROCm's ld.lld; TRITON_HIP_LLD_PATH does not say where that is",
)
needs_class_refused = pytest.mark.skipif(OF_34, reason="Triton 3.4 makes a cache key of a NamedTuple class")

CPU = torch.device("cpu")
ADAMW = Step(AdamW, F32, {})
STEPS = every_step()
ON_EVERY_TARGET = (
    "AdamW, default",
    "AdamW, clipped, torch.bfloat16, misaligned",
    "AdamW, bfloat16 stochastic, states int8",
    "AdamW, amp, clipped and averaged",
    "AdamW, capturable, clipped and averaged, bfloat16 stochastic",
    "Muon, clipped and averaged",
)


@pytest.fixture
def gpu() -> Iterator[Recorder]:
    """An sm_90 that nothing was compiled for yet."""
    forget_kernels()
    with Recorder().listening("sm_90") as recorder:
        yield recorder


def take_step(gpu: Recorder, step: Step, optimizer: RuleOptimizer, spy: Spy) -> list[Seen]:
    """The launches of a step with new gradients, which are what they must be."""
    step.give_gradients(optimizer)
    return launches_of_step(gpu, optimizer, spy)


def launches_of_step(gpu: Recorder, optimizer: RuleOptimizer, spy: Spy | None) -> list[Seen]:
    """The launches of a step, which are what they must be."""
    optimizer.step()
    launched = gpu.taken()
    check_step(launched, optimizer, spy)
    for seen in launched:
        check_arguments(seen, gpu.text(seen, "ttir"))
    return launched


def take_two_steps(gpu: Recorder, step: Step) -> list[Seen]:
    """The launches of the second of two steps, for which nothing is compiled."""
    return counted_steps(gpu, step)[0]


def counted_steps(gpu: Recorder, step: Step) -> tuple[list[Seen], dict[str, float]]:
    """The same, and what the table in tests/costs has of it. Between the two all that a schedule may change does."""
    optimizer = step.optimizer("triton", CPU)
    spy = Spy(optimizer)
    take_step(gpu, step, optimizer, spy)
    kernels = len(set(gpu.compiled))
    gpu.compiled.clear()
    for group in optimizer.param_groups:
        group |= {} if group["lr"] is None else {"lr": group["lr"] * 0.5}
    launched = take_step(gpu, step, optimizer, spy)
    assert gpu.compiled == []
    return launched, {"launches": len(launched), "kernels": kernels, "passes": passes(launched, optimizer)}


def passes(launched: list[Seen], optimizer: RuleOptimizer) -> float:
    """How often programs go over the chunks of all parameters."""
    chunks = sum(ceil(p.numel() / BLOCK) for group in optimizer.param_groups for p in group["params"])
    taken = {
        "multi_tensor": lambda seen: seen.launch.grid[0],
        "measure": lambda seen: seen.launch.grid[0],
        "partial_norms": lambda seen: seen.values["count"],
    }
    return sum(taken[seen.launch.name](seen) for seen in launched if seen.launch.name in taken) / chunks


COUNTED: dict[str, dict[str, float]] = {}


@pytest.mark.parametrize("name", STEPS)
def test_kernels_get_what_they_declare_and_are_compiled_once(name: str, gpu: Recorder) -> None:
    _, COUNTED[name] = counted_steps(gpu, STEPS[name])


@pytest.mark.parametrize("name", STEPS)
def test_warmup_leaves_nothing_to_compile(name: str, gpu: Recorder) -> None:
    optimizer = STEPS[name].optimizer("triton", CPU)
    optimizer.warmup()
    assert gpu.compiled
    assert {seen.launch.name for seen in gpu.taken()} <= {"partial_norms"}  # of no gradient of the user's
    gpu.compiled.clear()
    for _ in range(2):
        STEPS[name].give_gradients(optimizer)
        optimizer.step()
    assert gpu.compiled == []


def test_launches_are_costs_as_committed(gpu: Recorder, write_costs: bool) -> None:
    for name in STEPS.keys() - COUNTED.keys():  # of which the test above was not run
        forget_kernels()
        gpu.compiled.clear()
        _, COUNTED[name] = counted_steps(gpu, STEPS[name])
    costs.compare("launches", COUNTED, write_costs)


@pytest.mark.parametrize("target", ["sm_80", "sm_100", pytest.param("gfx942", marks=needs_lld)])
def test_each_target_has_kernels_of_its_own(target: str, gpu: Recorder) -> None:
    for name in ON_EVERY_TARGET:
        forget_kernels()
        with Recorder().listening(target) as other:
            launched = take_two_steps(other, STEPS[name])
        for seen in launched:
            compiled = seen.launch.metadata
            assert (compiled.target.backend, compiled.target.arch) == stub_driver.TARGETS[target][:2]
            assert compiled.target.warp_size == stub_driver.TARGETS[target][2]


@needs_lld
def test_targets_take_turns_in_a_process(gpu: Recorder) -> None:
    for target in ("sm_90", "gfx942", "sm_90"):
        gpu.compiled.clear()
        stub_driver.install(target, gpu.on_launch)
        (seen,) = take_two_steps(gpu, ADAMW)
        compiled = seen.launch.metadata
        assert compiled.target.arch == stub_driver.TARGETS[target][1]
        assert compiled.num_warps * compiled.target.warp_size == 256


def test_schedules_compile_nothing(gpu: Recorder) -> None:
    """Not even whole numbers, 0 and 1."""
    params = [torch.nn.Parameter(torch.randn(100)) for _ in range(2)]
    optimizer = AdamW([{"params": [p]} for p in params], backend="triton")
    spy = Spy(optimizer)
    take_step(gpu, ADAMW, optimizer, spy)
    gpu.compiled.clear()
    for values in ({"lr": 1}, {"lr": 0.0}, {"lr": 16}, {"weight_decay": 0}, {"betas": (0.0, 0.5)}, {"eps": 1e-3}):
        optimizer.param_groups[1] |= values
        take_step(gpu, ADAMW, optimizer, spy)
    optimizer.param_groups[0] |= {"lr": 1, "weight_decay": 1}
    take_step(gpu, ADAMW, optimizer, spy)
    assert gpu.compiled == []


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
def test_sizes_compile_nothing(options: dict[str, Any], gpu: Recorder) -> None:
    """Neither of tensors, nor how many chunks there are."""
    step = Step(SGD, BF16, options)
    optimizer = step.optimizer("triton", CPU, ((3 * BLOCK,),))
    take_step(gpu, step, optimizer, Spy(optimizer))
    gpu.compiled.clear()
    for numel in (1, 15, 16, 17, 15 * BLOCK, 16 * BLOCK, 16 * BLOCK + 1):
        optimizer = step.optimizer("triton", CPU, ((numel,),))
        launched = take_step(gpu, step, optimizer, Spy(optimizer))
        assert launched[-1].launch.grid == (ceil(numel / BLOCK), 1, 1)
    assert gpu.compiled == []


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
def test_2_to_31_elements_compile_nothing(options: dict[str, Any], gpu: Recorder) -> None:
    small = Step(SGD, BF16, options).optimizer("triton", CPU, ((5,),))
    take_step(gpu, Step(SGD, BF16, options), small, Spy(small))
    gpu.compiled.clear()
    p = torch.nn.Parameter(torch.empty(2**31, dtype=BF16))  # memory that nobody touches is not taken
    p.grad = torch.empty_like(p)
    optimizer = SGD([p], backend="triton", **options)
    spy = Spy(optimizer)
    optimizer.step()
    check_step(gpu.launched, optimizer, spy)
    assert gpu.launched[-1].launch.grid == (2**21, 1, 1)
    assert gpu.compiled == []


def test_parameters_without_a_gradient_are_left_out(gpu: Recorder) -> None:
    optimizer = ADAMW.optimizer("triton", CPU)
    ADAMW.give_gradients(optimizer)
    first, *_ = optimizer.param_groups[0]["params"]
    gradient, first.grad = first.grad, None
    launches_of_step(gpu, optimizer, None)
    first.grad = gradient  # its step is the first, the others' the second
    launches_of_step(gpu, optimizer, None)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype")
def test_gradients_of_another_dtype_are_read_as_what_they_are(gpu: Recorder) -> None:
    optimizer = Step(AdamW, BF16, {}).optimizer("triton", CPU)
    for p in optimizer.param_groups[0]["params"]:
        p.grad_dtype = F32
        p.grad = torch.randn(p.shape)
    launches_of_step(gpu, optimizer, Spy(optimizer))


@pytest.mark.parametrize(("backend", "name"), [("nvidia", "CudaLauncher"), ("amd", "HIPLauncher")])
def test_triton_calls_its_launchers_as_the_stubs(backend: str, name: str) -> None:
    """Triton 3.4's and 3.6's name fewer of what they take."""
    launcher = getattr(importlib.import_module(f"triton.backends.{backend}.driver"), name)
    own, theirs = (
        [p.name for p in inspect.signature(cls.__call__).parameters.values() if p.kind is not p.VAR_POSITIONAL]
        for cls in (stub_driver.Launcher, launcher)
    )
    words = ["self", "gridX", "gridY", "gridZ", "stream", "function", "kernel_metadata", "launch_metadata"]
    words += ["launch_enter_hook", "launch_exit_hook"]
    assert theirs == words[: len(theirs)]
    assert len(own) == len(words)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("power", [1.0, 2.0, 3.5, inf])
def test_norms_are_launched(power: float, dtype: torch.dtype, gpu: Recorder) -> None:
    tensors = [torch.randn(numel).to(dtype) for numel in (5, 20 * BLOCK, 1)]
    for _ in range(2):
        partial_norms(tensors, Norm(power), "triton")
    assert len(gpu.compiled) == 1
    for seen in gpu.launched:
        check_arguments(seen, gpu.text(seen, "ttir"))
        assert seen.read("gradients", 3).tolist() == [t.data_ptr() for t in tensors]
        assert seen.read("tensors", 3, 2)[:, 0].tolist() == [t.numel() for t in tensors]
        assert (seen.values["count"], seen.values["columns"]) == (22, 2)
        assert seen.launch.grid == (ceil(22 / gradient_norm.CHUNKS), 1, 1)
        assert seen.constant("KIND") == Norm(power).kind


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_symmetric_products_are_launched(dtype: torch.dtype, gpu: Recorder) -> None:
    x, c = torch.randn(2, 192, 48, dtype=dtype), torch.randn(2, 192, 192, dtype=dtype)
    for alpha in (2.0, 1.0):  # numbers of the caller's are not compiled for
        out = product_of(x.mT.contiguous().mT, alpha, 0.5, c, backend="triton")
    assert len(gpu.compiled) == 1
    first, second = gpu.launched
    check_arguments(second, gpu.text(second, "ttir"))
    assert [seen.values["alpha"] for seen in (first, second)] == [2.0, 1.0]
    assert second.values["beta"] == 0.5
    assert (second.values["M"], second.values["K"]) == (192, 48)
    assert address(second.values["c"]) == c.data_ptr()
    assert address(second.values["out"]) == out.data_ptr()
    assert address(second.values["y"]) == address(second.values["x"])
    assert second.values["y_strides"] == second.values["x_strides"]
    assert second.values["x_strides"] == (192 * 48, 1, 192)
    assert second.values["out_strides"] == second.values["c_strides"] == out.stride()
    assert second.launch.grid == (symmetric_product.programs(2, 192, second.constant("BLOCK")), 1, 1)


# Faults that these tests are to find.


class BareScalars(Launcher):
    """Hands the kernel a NamedTuple class, of which Triton makes no cache key."""

    def __init__(self, kernel: Any, types: Any, constants: dict[str, Any], device: torch.device) -> None:
        super().__init__(kernel, types, constants | {"SCALARS": constants["SCALARS"].value}, device)


class AlwaysAligned(Launcher):
    """Compiles all for aligned addresses."""

    def __init__(self, kernel: Any, types: Any, constants: dict[str, Any], device: torch.device) -> None:
        super().__init__(kernel, types, constants | {"ALIGNED": True}, device)


class ShortGrid(Launcher):
    """Leaves a program out."""

    def __call__(self, programs: int, *arguments: Any) -> None:
        super().__call__(programs - 1, *arguments)


class Swapped(Launcher):
    """Takes the signal for the gradients, and these for the signal."""

    def __call__(self, programs: int, *arguments: Any) -> None:
        chunks, tensors, gradients, *others, stats = arguments
        super().__call__(programs, chunks, tensors, stats, *others, gradients)


class ReversedRow(Launcher):
    """Hands the scalars over in another order."""

    def __call__(self, programs: int, *arguments: Any) -> None:
        super().__call__(programs, *arguments[:3], arguments[3][::-1], *arguments[4:])


@pytest.mark.parametrize(
    "fault", [pytest.param(BareScalars, marks=needs_class_refused), AlwaysAligned, ShortGrid, Swapped, ReversedRow]
)
def test_faults_are_found(fault: type[Launcher], gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(AdamW, F32, {"max_grad_norm": 1.0}, misaligned=True)
    take_two_steps(gpu, step)
    monkeypatch.setattr(triton_backend, "Launcher", fault)
    with pytest.raises(RuntimeError if fault is BareScalars else AssertionError) as raised:
        take_two_steps(gpu, step)
    if fault is BareScalars:
        assert "TypeError: 'type' object is not iterable" in str(raised.value)
