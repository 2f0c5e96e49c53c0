"""The dispatcher: a table of what is chosen, and that a pinned backend runs or raises."""

from __future__ import annotations

import itertools

import pytest
import torch

import triton_optim
from triton_optim.dispatch import BACKENDS, Machine, Request, choose, unable

EVERYTHING = Machine(triton=True, interpreter=False, compiler=True, cpp=True)
NO_TRITON = Machine(triton=False, interpreter=False, compiler=True, cpp=True)
NO_COMPILER = Machine(triton=True, interpreter=False, compiler=False, cpp=False)
NOTHING = Machine(triton=False, interpreter=False, compiler=False, cpp=False)
INTERPRETER = Machine(triton=True, interpreter=True, compiler=True, cpp=True)
NO_CPP = Machine(triton=True, interpreter=False, compiler=True, cpp=False)

f32, bf16, c64 = torch.float32, torch.bfloat16, torch.complex64


@pytest.mark.parametrize(
    ("request_", "machine", "expected"),
    [
        (Request("cuda", f32), EVERYTHING, "triton"),
        (Request("cuda", torch.float64), EVERYTHING, "triton"),
        (Request("xpu", bf16), EVERYTHING, "triton"),
        (Request("cuda", f32), NO_COMPILER, "triton"),
        (Request("cuda", f32), NO_TRITON, "eager"),
        (Request("cpu", f32), EVERYTHING, "cpp"),
        (Request("cpu", f32), NO_CPP, "compiled"),
        (Request("cpu", bf16), NO_TRITON, "cpp"),
        (Request("cpu", torch.float8_e5m2), EVERYTHING, "compiled"),
        (Request("cpu", f32), NO_COMPILER, "eager"),
        (Request("cpu", f32), INTERPRETER, "cpp"),
        (Request("mps", f32), NO_TRITON, "compiled"),
        (Request("mps", f32), NOTHING, "compiled"),
        (Request("privateuseone", f32), EVERYTHING, "eager"),
        (Request("cuda", c64), EVERYTHING, "eager"),
        (Request("cpu", c64), EVERYTHING, "eager"),
        (Request("cuda", f32, differentiable=True), EVERYTHING, "eager"),
        (Request("cuda", f32, sparse=True), EVERYTHING, "eager"),
        (Request("cuda", f32, sparse=True, fused=True), EVERYTHING, "eager"),
        (Request("cuda", f32, layout="overlapping"), EVERYTHING, "eager"),
        (Request("cuda", f32, layout="strided"), EVERYTHING, "eager"),
        (Request("cuda", f32, fused=True), EVERYTHING, "triton"),
        (Request("cpu", f32, fused=True), EVERYTHING, "cpp"),
        (Request("cpu", f32, fused=True), NO_CPP, "compiled"),
        (Request("cuda", f32, foreach=True), EVERYTHING, "compiled"),
        (Request("cpu", f32, foreach=True), EVERYTHING, "compiled"),
        (Request("cpu", f32, foreach=True), NO_COMPILER, "eager"),
        (Request("cpu", c64, fused=True), EVERYTHING, "eager"),
        (Request("cuda", f32, foreach=False), EVERYTHING, "eager"),
        (Request("cuda", f32, fused=False), EVERYTHING, "eager"),
        (Request("cuda", f32, foreach=False, fused=False), EVERYTHING, "eager"),
        (Request("cuda", f32, foreach=False, fused=True), EVERYTHING, "triton"),
        (Request("cuda", f32, foreach=True, fused=False), EVERYTHING, "compiled"),
        (Request("cuda", f32, pinned="triton"), EVERYTHING, "triton"),
        (Request("cpu", f32, pinned="triton"), INTERPRETER, "triton"),
        (Request("cuda", f32, pinned="compiled"), EVERYTHING, "compiled"),
        (Request("cuda", c64, pinned="eager"), NOTHING, "eager"),
        (Request("cpu", f32, pinned="cpp"), NO_TRITON, "cpp"),
    ],
)
def test_choices(request_: Request, machine: Machine, expected: str) -> None:
    choice = choose(request_, machine)
    assert choice.backend == expected
    assert choice.reason


@pytest.mark.parametrize(
    ("request_", "machine", "cause"),
    [
        (Request("cpu", f32, pinned="triton"), EVERYTHING, "needs GPU tensors"),
        (Request("cuda", f32, pinned="triton"), NO_TRITON, "not installed"),
        (Request("cuda", c64, pinned="triton"), EVERYTHING, "pairs of reals"),
        (Request("cuda", f32, sparse=True, pinned="triton"), EVERYTHING, "gathered, updated and scattered"),
        (Request("cuda", f32, layout="strided", pinned="triton"), EVERYTHING, "gaps"),
        (Request("cuda", f32, differentiable=True, pinned="compiled"), EVERYTHING, "autograd"),
        (Request("cpu", f32, pinned="compiled"), NO_COMPILER, "no C\\+\\+ compiler"),
        (Request("cuda", f32, pinned="compiled"), NO_TRITON, "not installed"),
        (Request("cpu", f32, layout="overlapping", pinned="compiled"), EVERYTHING, "overlap"),
        (Request("cuda", f32, pinned="cpp"), EVERYTHING, "needs CPU tensors"),
        (Request("cpu", f32, pinned="cpp"), NO_COMPILER, "no C\\+\\+ compiler"),
        (Request("cpu", f32, pinned="cpp"), NO_CPP, "on Linux only"),
        (Request("cpu", c64, pinned="cpp"), EVERYTHING, "pairs of reals"),
        (Request("cpu", torch.float8_e5m2, pinned="cpp"), EVERYTHING, "no torch.float8_e5m2"),
    ],
)
def test_a_pinned_backend_never_falls_back(request_: Request, machine: Machine, cause: str) -> None:
    with pytest.raises(RuntimeError, match=cause) as raised:
        choose(request_, machine)
    message = str(raised.value)
    assert f'backend="{request_.pinned}"' in message  # value
    assert "leave backend out" in message  # fix


def test_every_choice_can_run() -> None:
    flags = [None, True, False]
    layouts = ["dense", "strided", "overlapping"]
    machines = [Machine(*bits) for bits in itertools.product([True, False], repeat=4) if bits[0] or not bits[1]]
    for machine, device, dtype, layout, fused, foreach in itertools.product(
        machines, ["cpu", "cuda", "xpu", "mps", "meta"], [f32, bf16, c64], layouts, flags, flags
    ):
        request = Request(device, dtype, layout, fused=fused, foreach=foreach)
        choice = choose(request, machine)
        assert choice.backend in BACKENDS
        assert unable(choice.backend, request, machine) is None


def test_choose_is_pure() -> None:
    request = Request("cuda", f32)
    assert choose(request, EVERYTHING) == choose(request, EVERYTHING)


def test_explain_before_and_after_the_first_step(backend: str, device: torch.device) -> None:
    params = [torch.nn.Parameter(torch.randn(n, device=device)) for n in (40, 3, 70)]
    optimizer = triton_optim.AdamW(params, backend=backend)
    before = triton_optim.explain(optimizer)
    assert not optimizer.state
    sum(p.sum() for p in params).backward()
    optimizer.step()
    after = triton_optim.explain(optimizer)
    assert list(before) == list(after)
    (bucket,) = after
    assert (bucket.backend, bucket.tensors, bucket.elements) == (backend, 3, 113)
    assert bucket.dtypes == dict.fromkeys(("p", "g", "exp_avg", "exp_avg_sq"), torch.float32)
    assert bucket.device == params[0].device
    text = str(after)
    assert backend in text
    assert "exp_avg_sq float32" in text
    if backend in ("triton", "cpp"):
        assert bucket.launches == 1
        assert bucket.bytes_per_parameter == 28


def test_eager_traffic_is_counted_on_the_rule_itself() -> None:
    # p - lr * (g + l2 * p): four operations and the copy; 2 + 3 + 2 + 3 + 2 accesses of 4 bytes.
    optimizer = triton_optim.SGD([torch.nn.Parameter(torch.ones(5))], backend="eager")
    (bucket,) = triton_optim.explain(optimizer)
    assert bucket.launches == 5
    assert bucket.bytes_per_parameter == 4 * 12


def test_buckets_split_by_dtype_and_device_type(device: torch.device) -> None:
    params = [torch.nn.Parameter(torch.ones(4, dtype=dtype, device=device)) for dtype in (f32, bf16, f32, c64)]
    rows = triton_optim.explain(triton_optim.AdamW(params))
    assert sorted((r.tensors, str(r.dtypes["p"])) for r in rows) == [
        (1, "torch.bfloat16"),
        (1, "torch.complex64"),
        (2, "torch.float32"),
    ]


def test_auto_falls_back_to_eager_when_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_optim.backends.compiled import graph as compiled_graph

    def failing(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(compiled_graph, "graph_for", failing)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = triton_optim.SGD([p], lr=0.5, foreach=True)
    with pytest.warns(RuntimeWarning, match="no space left"):
        optimizer.step()
    assert p.tolist() == [0.5] * 3
    (bucket,) = triton_optim.explain(optimizer)
    assert bucket.backend == "eager"
    assert "no space left" in bucket.reason

    q = torch.nn.Parameter(torch.ones(3))
    q.grad = torch.ones(3)
    pinned = triton_optim.SGD([q], lr=0.5, backend="compiled")
    with pytest.raises(RuntimeError, match="no space left"):
        pinned.step()
    assert q.tolist() == [1.0] * 3
    assert not pinned.state


@pytest.mark.parametrize("machine", [EVERYTHING, NO_TRITON])
def test_triton_is_to_be_installed_where_it_is_not(machine: Machine) -> None:
    with pytest.raises(RuntimeError) as error:
        choose(Request("cpu", f32, pinned="triton"), machine)
    fix = "Move the parameters to a GPU, or" if machine.triton else "Install it (pip install triton), or"
    assert fix in str(error.value)
    assert ("pip install" in str(error.value)) == (not machine.triton)
