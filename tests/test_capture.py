"""A step that is captured once and replayed: on a GPU by a CUDA graph, elsewhere by a tape of all that it did."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HAS_GPU, needs_loops
from launches import replace_launches
from table import CASES, Case, rows
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import triton_optim

REPLAYS = 100
BF16 = torch.bfloat16
SHAPES = [(33,), (7,)]


class Tape(TorchDispatchMode):
    """Every operation and launch, to be done again with the same tensors; the host may not ask for a value."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.done: list[Any] = []

        def recorded(*given: Any) -> None:
            with _disable_current_modes():
                launch(*given)
            if torch._C._len_torch_dispatch_stack():
                self.done.append((None, lambda: launch(*given), None))

        launch = replace_launches(monkeypatch, recorded)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default), "the host waits"
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.done.append((func, lambda: func(*args, **(kwargs or {})), out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, again, out in self.done:
                new = again()
                if func is None or func._schema.is_mutable:
                    continue
                pairs = zip(out, new, strict=True) if isinstance(out, (tuple, list)) else [(out, new)]
                for old, value in pairs:
                    if isinstance(old, Tensor):
                        old.copy_(value)


def start(device: torch.device, dtype: torch.dtype) -> list[Parameter]:
    random = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=random).to(device, dtype)) for shape in SHAPES]
    for p in params:
        p.grad = torch.zeros_like(p)
    return params


def set_gradients(params: list[Parameter], k: int) -> None:
    random = torch.Generator().manual_seed(1 + k)
    for p in params:
        p.grad.copy_(torch.randn(p.shape, generator=random))


def everything(params: list[Parameter], optimizer: triton_optim.RuleOptimizer) -> list[Tensor]:
    states = (v for p in params for v in optimizer.state.get(p, {}).values())
    return [*(p.detach() for p in params), *(torch.as_tensor(v) for v in states)]


def run(
    optimizer: Any, params: list[Parameter], scaler: list[Tensor], tape: Tape | None, replays: int = REPLAYS
) -> None:
    """Three steps, one that may be taped, and then one less than `replays` more, under a schedule."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, replays)

    def step() -> None:
        if scaler:
            optimizer.grad_scale, optimizer.found_inf = scaler
        optimizer.step()

    for k in range(3 + replays):
        set_gradients(params, k)
        if scaler:
            scaler[1].fill_(float(k % 7 == 5))
        if tape is None or k < 3:
            step()
        elif k == 3:
            optimizer.push_hyperparameters()
            with tape:
                step()
        else:
            optimizer.push_hyperparameters()
            tape.replay()
        schedule.step()
        if k == replays // 2:
            for group in optimizer.param_groups:
                group["seed"] = 2**40 + 7
                if "weight_decay" in group:
                    group["weight_decay"] = 0.2


@rows(*(case for case in CASES if case.elementwise and not case.sparse))
def test_every_rule_is_replayed_bit_for_bit(case: Case, device: torch.device, monkeypatch: Any) -> None:
    if HAS_GPU:
        pytest.skip("a tape of what a CPU does; test_cuda_graph is the real thing")
    results = []
    for taped in (False, True):
        params = start(device, torch.float32)
        optimizer = case.ours(params, lr=0.01, capturable=True, backend="eager")
        run(optimizer, params, [], Tape(monkeypatch) if taped else None)
        results.append(everything(params, optimizer))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=needs_loops)])
@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_numbers_of_every_kind_reach_the_replays(
    kind: Any, backend: str, device: torch.device, monkeypatch: Any
) -> None:
    """A new object in every step, of a number that all kinds have."""
    if HAS_GPU:
        pytest.skip("a tape of what a CPU does; test_cuda_graph is the real thing")
    results = []
    for change, tape in ((float, None), (kind, Tape(monkeypatch))):
        params = start(device, torch.float32)
        optimizer = triton_optim.AdamW(params, lr=change(0.5), capturable=True, backend=backend)
        for k in range(6):
            set_gradients(params, k)
            optimizer.param_groups[0] |= {
                "lr": change(2.0**-k),
                "weight_decay": change(2.0 ** (-k - 1)),
                "betas": (change(1 - 2.0 ** (-k - 1)), change(1 - 2.0 ** (-k - 3))),
            }
            if tape is None or k < 2:
                optimizer.step()
                continue
            optimizer.push_hyperparameters()
            if k == 2:
                with tape:
                    optimizer.step()
            else:
                tape.replay()
        results.append(everything(params, optimizer))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_numbers_that_are_tensors_on_the_host_are_brought_to_the_device(device: torch.device) -> None:
    params = start(device, torch.float32)
    optimizer = triton_optim.AdamW(params, lr=torch.tensor(0.5), capturable=True)
    optimizer.step()
    optimizer.param_groups[0]["lr"].fill_(0.25)
    optimizer.push_hyperparameters()
    assert optimizer.hyperparameters.on_device(device).group(0)["lr"] == 0.25


def test_numbers_of_every_kind_are_pushed(device: torch.device) -> None:
    params = start(device, torch.float32)
    optimizer = triton_optim.AdamW(params, capturable=True, backend="eager")
    optimizer.step()
    for value in (torch.tensor(0.25), np.float32(0.5), np.array(0.125), 1):
        optimizer.param_groups[0] |= {"lr": value, "betas": (value / 2, value / 4)}
        optimizer.push_hyperparameters()
        held = optimizer.hyperparameters.on_device(device).group(0)
        assert (held["lr"], *held["betas"]) == (float(value), float(value) / 2, float(value) / 4)


WHOLE = {"max_grad_norm": 1.0, "amp": "fused", "ema_decay": 0.9, "ema_warmup": True}
STOCHASTIC = {"param_precision": "stochastic", "state_dtype": BF16, "ema_dtype": BF16}


@needs_loops
@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float32, WHOLE), (BF16, WHOLE | STOCHASTIC)], ids=["float32", "stochastic"]
)
def test_a_whole_step_is_replayed_bit_for_bit(
    dtype: torch.dtype, options: dict[str, Any], device: torch.device, monkeypatch: Any
) -> None:
    if HAS_GPU:
        pytest.skip("a tape of what a CPU does; test_cuda_graph is the real thing")
    results = []
    for taped in (False, True):
        params = start(device, dtype)
        optimizer = triton_optim.AdamW(params, lr=0.01, capturable=True, backend="triton", **options)
        scaler = [torch.full((), 8.0), torch.zeros(())]
        # A launch takes the interpreter 10 ms.
        run(optimizer, params, scaler, Tape(monkeypatch) if taped else None, 12)
        results.append([*everything(params, optimizer), optimizer.grad_norm])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.float32, WHOLE), (BF16, WHOLE | STOCHASTIC)],
    ids=["float32", "whole", "stochastic"],
)
def test_cuda_graph(dtype: torch.dtype, options: dict[str, Any], device: torch.device) -> None:
    results = []
    for captured in (False, True):
        params = start(device, dtype)
        optimizer = triton_optim.AdamW(params, lr=0.01, capturable=True, backend="triton", **options)
        scaler = [torch.full((), 8.0, device=device), torch.zeros((), device=device)] if "amp" in options else []
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, REPLAYS)
        graph = torch.cuda.CUDAGraph()
        if scaler:
            optimizer.grad_scale, optimizer.found_inf = scaler
        for k in range(3 + REPLAYS):
            set_gradients(params, k)
            if captured and k == 3:
                optimizer.push_hyperparameters()
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    optimizer.step()
            if captured and k >= 3:
                optimizer.push_hyperparameters()
                graph.replay()
            else:
                optimizer.step()
            schedule.step()
        torch.cuda.synchronize()
        results.append(everything(params, optimizer))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stepped", [True, False])
def test_capturing_without_a_gradient_raises(stepped: bool, device: torch.device, monkeypatch: Any) -> None:
    """Also after a step in which no parameter had one."""
    params = start(device, torch.float32)
    optimizer = triton_optim.AdamW(params, capturable=True)
    if not stepped:
        params[0].grad = None
    for p in params[1:]:
        p.grad = p.grad if stepped else None
    optimizer.step()
    params[0].grad = torch.ones_like(params[0])
    params[1].grad = None
    monkeypatch.setattr("triton_optim.engine.engine.capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="parameter 1 requires a gradient and has none while a graph is captured"):
        optimizer.step()


@pytest.mark.parametrize("captured", [0, 1])
def test_capturing_parameters_elsewhere_raises(captured: int, monkeypatch: Any) -> None:
    """Whichever comes first."""
    devices = ["cpu", "meta"]
    params = [Parameter(torch.ones(2, device=where)) for where in devices]
    optimizer = triton_optim.AdamW(params, capturable=True, backend="eager")
    for p in params:
        p.grad = torch.ones_like(p)
    monkeypatch.setattr("triton_optim.engine.engine.capturing", lambda device: device.type == devices[captured])
    with pytest.raises(RuntimeError, match=f"parameter {1 - captured} is on {devices[1 - captured]}"):
        optimizer.step()


def test_capturing_numbers_of_the_host_raises(device: torch.device, monkeypatch: Any) -> None:
    params = start(device, torch.float32)
    optimizer = triton_optim.AdamW(params)
    optimizer.step()
    monkeypatch.setattr("triton_optim.engine.engine.capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="capturable=True"):
        optimizer.step()


def test_hyperparameters_that_changed_must_be_pushed_before_a_capture(device: torch.device, monkeypatch: Any) -> None:
    params = start(device, torch.float32)
    optimizer = triton_optim.AdamW(params, capturable=True)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    monkeypatch.setattr("triton_optim.util.on_device.capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="push_hyperparameters"):
        optimizer.step()


@pytest.mark.parametrize("change", ["moved", "loaded", "added", "replaced"])
def test_a_model_that_changed_after_its_capture_is_refused(change: str, device: torch.device, monkeypatch: Any) -> None:
    params = start(device, torch.float32)
    optimizer = triton_optim.AdamW(params, capturable=True, backend="eager")
    optimizer.step()
    with monkeypatch.context() as patch:
        patch.setattr("triton_optim.engine.engine.capturing", lambda device: True)
        optimizer.step()
    optimizer.push_hyperparameters()
    if change == "moved":
        params[1].data = params[1].data.clone()
    elif change == "replaced":
        optimizer.param_groups[0]["params"][1] = Parameter(params[1].detach().clone())
    elif change == "loaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        optimizer.add_param_group({"params": [Parameter(torch.zeros(2, device=device))]})
    with pytest.raises(RuntimeError, match="Capture it again"):
        optimizer.push_hyperparameters()
