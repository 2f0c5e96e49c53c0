"""Rows of scalars that the device forms: the host's, in one launch, however the numbers change."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from conftest import HAS_GPU, TRITON_LOOPS
from launches import replace_launches, watch_launches
from table import CASES, Case, rows
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import triton_optim
from triton_optim.backends.triton.recording import Recorder, Unrecorded, reads_its_arguments_alone
from triton_optim.kernels.language import jit

pytestmark = pytest.mark.skipif(not TRITON_LOOPS, reason="no Triton, or an interpreter of it that NumPy broke")
F64 = torch.float64


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The row table of every update, which is not made."""
    seen: list[torch.Tensor] = []

    def of_update(launcher: Any, programs: int, *arguments: Any) -> None:
        if launcher.kernel.__name__ == "multi_tensor":
            seen.append(arguments[3].cpu().clone())
        else:
            launch(launcher, programs, *arguments)

    launch = replace_launches(monkeypatch, of_update)
    return seen


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each launch formed."""
    seen: list[int] = []

    def of_rows(launcher: Any, programs: int, *arguments: Any) -> None:
        if launcher.kernel.__name__ == "form_rows":
            seen.append(programs)

    watch_launches(monkeypatch, of_rows)
    return seen


def two(device: torch.device, dtype: torch.dtype = F64) -> list[Parameter]:
    params = [Parameter(torch.ones(5, device=device, dtype=dtype)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def run(make: Any, device: torch.device, tables: list[torch.Tensor], between: Any) -> list[torch.Tensor]:
    """The rows of six steps."""
    optimizer = make(two(device))
    tables.clear()
    for k in range(6):
        between(optimizer, k)
        optimizer.step()
    return list(tables)


def schedule(optimizer: Any, k: int) -> None:
    group = optimizer.param_groups[0]
    group["lr"] = 0.1 / (k + 1)
    if "weight_decay" in group:
        group["weight_decay"] = 0.01 * k
    if "betas" in group:
        group["betas"] = (0.9 - 0.1 * k, *(0.999 - 0.01 * k for _ in group["betas"][1:]))


@rows(*(case for case in CASES if case.elementwise and not case.sparse))
def test_rows_of_every_rule_are_those_of_the_host(
    case: Case, device: torch.device, tables: list[torch.Tensor], formed: list[int]
) -> None:
    options = {"backend": "triton", "ema_decay": 0.9, "ema_warmup": True}
    host, own = (
        run(lambda ps, c=c: case.ours(ps, **options, capturable=c), device, tables, schedule) for c in (False, True)
    )
    assert formed == [1] * 6
    for a, b in zip(host, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


def test_groups_have_rows_of_their_own_and_a_missing_gradient_counts_nothing(
    device: torch.device, tables: list[torch.Tensor], formed: list[int]
) -> None:
    def make(params: list[Parameter], capturable: bool) -> Any:
        groups = [{"params": params[:1], "lr": 0.3}, {"params": params[1:], "maximize": True, "betas": (0.5, 0.7)}]
        return triton_optim.NAdam(groups, lr=0.1, backend="triton", capturable=capturable)

    def between(optimizer: Any, k: int) -> None:
        first = optimizer.param_groups[0]["params"][0]
        first.grad = None if k in (2, 3) else torch.ones_like(first)

    host, own = (run(lambda ps, c=c: make(ps, c), device, tables, between) for c in (False, True))
    assert formed == [2] * 6
    for k, (a, b) in enumerate(zip(host, own, strict=True)):
        there = [1] if k in (2, 3) else [0, 1]
        torch.testing.assert_close(a[there], b[there], rtol=1e-13, atol=0)


def test_a_bucket_without_any_gradient_is_left_out(device: torch.device) -> None:
    """Of parameters of two dtypes, in the step that records their rows and later."""
    params = [Parameter(torch.ones(3, device=device, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    optimizer = triton_optim.SGD(params, lr=1.0, momentum=0.5, backend="triton", capturable=True, ema_decay=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.engine.plan = None
    params[1].grad = None
    optimizer.step()
    assert [p[0].item() for p in params] == [-1.5, 0.0]
    optimizer.param_groups[0]["lr"] = 0.0
    params[1].grad = torch.ones(3, device=device, dtype=torch.float64)
    optimizer.step()
    assert [p[0].item() for p in params] == [-1.5, 0.0]


class Scalars(NamedTuple):
    lr: float
    factor: float


@jit
def scaled(p, g, h):
    return (p - h.lr * h.factor * g,)


class Waving(triton_optim.RuleOptimizer):
    """Its scalars take a cosine, which is no operation that is recorded."""

    rule = scaled

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"lr": 0.1}, **options)
        self.temperature = 2.0

    def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
        return Scalars(group["lr"], torch.as_tensor(step, dtype=F64).cos() * self.temperature)


class Cooling(Waving):
    """Its scalars take a number of the optimizer's own."""

    def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
        return Scalars(group["lr"], self.temperature / step)


class Phased(Waving):
    """In a dict that is private."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self._phase = {"scale": [2.0]}

    def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
        return Scalars(group["lr"], self._phase["scale"][0] / step)


PHASE = {"scale": 2.0}


class ByModule(Waving):
    """In a dict of the module."""

    def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
        return Scalars(group["lr"], PHASE["scale"] / step)


def scale_of(phase: Any) -> float:
    return phase["scale"] if phase is not PHASE else PHASE["scale"]


class ByFunction(Waving):
    """By a function that reads what it is not given."""

    def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
        return Scalars(group["lr"], scale_of(None or group["own"]) / step)


class ByGroup(Waving):
    """In a dict of the group."""

    def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
        return Scalars(group["lr"], group["own"]["scale"] / step)


class ByCarry(Waving):
    """In what is carried, which is formed of a dict."""

    def init_scalar_state(self, group: dict[str, Any]) -> dict[str, float]:
        return {"mu": 1.0}

    def update_scalar_state(self, group: dict[str, Any], step: Any, *, mu: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"mu": mu * 0.5 + group["own"]["scale"]}

    def scalars(self, group: dict[str, Any], step: Any, *, mu: Any) -> Scalars:  # type: ignore[override]
        return Scalars(group["lr"], mu)


@pytest.mark.parametrize(
    ("cls", "launches"),
    [(Waving, 0), (Cooling, 6), (Phased, 6), (ByModule, 6), (ByFunction, 6), (ByGroup, 6), (ByCarry, 6)],
)
def test_a_users_own_scalars_follow_their_numbers(
    cls: Any, launches: int, device: torch.device, tables: list[torch.Tensor], formed: list[int]
) -> None:
    def between(optimizer: Any, k: int) -> None:
        optimizer.temperature = PHASE["scale"] = 2.0 if k < 3 else 1.0
        optimizer._phase = getattr(optimizer, "_phase", {"scale": [0.0]})
        optimizer._phase["scale"][0] = optimizer.temperature
        optimizer.param_groups[0].setdefault("own", {})["scale"] = optimizer.temperature

    host, own = (
        run(lambda ps, c=c: cls(ps, backend="triton", capturable=c), device, tables, between) for c in (False, True)
    )
    assert len(formed) == launches
    for a, b in zip(host, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


def test_scalars_that_are_replaced_are_recorded_anew(
    device: torch.device, tables: list[torch.Tensor], formed: list[int]
) -> None:
    def between(optimizer: Any, k: int) -> None:
        if k == 3:
            optimizer.scalars = lambda group, step: Scalars(group["lr"] * 3, step)

    own = run(lambda ps: Cooling(ps, backend="triton", capturable=True), device, tables, between)
    assert formed == [1] * 6
    assert [table[0, 1:].tolist() for table in own] == [
        pytest.approx([0.1, 2 / (k + 1)] if k < 3 else [0.1 * 3, k + 1]) for k in range(6)
    ]


def helper_of_arguments(x: Any) -> Any:
    return torch.maximum(x, x) if isinstance(x, torch.Tensor) else max(x, math.pi)


class Arguments(Waving):
    def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
        return Scalars(group["lr"], helper_of_arguments(step))

    def by_default(self, group: dict[str, Any], step: Any, seen: list[Any] = []) -> Scalars:  # noqa: B006
        return Scalars(group["lr"], step)

    def by_super(self, group: dict[str, Any], step: Any) -> Scalars:
        return super().scalars(group, step)

    def by_import(self, group: dict[str, Any], step: Any) -> Any:
        import conftest

        return conftest.HAS_GPU

    def by_lambda(self, group: dict[str, Any], step: Any) -> Any:
        return (lambda: self.temperature)()


def test_what_reads_its_arguments_alone() -> None:
    optimizer = Arguments([Parameter(torch.zeros(1))])
    assert reads_its_arguments_alone(optimizer.scalars)
    assert reads_its_arguments_alone(optimizer.update_scalar_state)
    others = [optimizer.by_default, optimizer.by_super, optimizer.by_import, optimizer.by_lambda, optimizer.step]
    others += [cls([Parameter(torch.zeros(1))]).scalars for cls in (Waving, Cooling, Phased, ByModule, ByFunction)]
    assert not any(map(reads_its_arguments_alone, others))


@rows(*(case for case in CASES if case.elementwise and not case.sparse))
def test_scalars_of_the_package_are_recorded_once(case: Case) -> None:
    optimizer = case.ours([Parameter(torch.zeros(2, 2))])
    assert reads_its_arguments_alone(optimizer.scalars)
    assert reads_its_arguments_alone(optimizer.update_scalar_state)


def test_hyperparameters_on_the_device_are_read_where_they_are(
    device: torch.device, tables: list[torch.Tensor], formed: list[int]
) -> None:
    rates = [torch.tensor(0.1, device=device, dtype=dtype) for dtype in (torch.float32, F64)]

    def between(optimizer: Any, k: int) -> None:
        rate = rates[k // 3]  # the tensor is written, and then another
        rate.fill_(0.5 / (k + 1))
        optimizer.param_groups[0]["lr"] = rate

    make = lambda ps: triton_optim.AdamW(ps, lr=rates[0], backend="triton", capturable=True)  # noqa: E731
    own = run(make, device, tables, between)
    assert formed == [1] * 6
    for k, table in enumerate(own):
        beta1 = 0.9
        dtype = torch.float32 if k < 3 else F64
        lr = torch.tensor(0.5 / (k + 1), dtype=dtype).item()
        column = 1 + ["decay", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "step_size"].index("step_size")
        assert table[0, column].item() == pytest.approx(lr / (1 - beta1 ** (k + 1)), rel=1e-13)


class Everything(TorchDispatchMode):
    """What a step asks of a device beside launches."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.namespace == "aten" and "empty" not in str(func):
            self.done.append(str(func))
        return func(*args, **(kwargs or {}))


BF16 = torch.bfloat16
STOCHASTIC = {"param_precision": "stochastic", "state_dtype": BF16, "ema_dtype": BF16}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(("dtype", "more"), [(torch.float32, {}), (BF16, STOCHASTIC)], ids=["float32", "stochastic"])
def test_unscaling_clipping_updating_and_averaging_are_three_launches_and_nothing_else(
    dtype: torch.dtype, more: dict[str, Any], capturable: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[Any] = []
    replace_launches(monkeypatch, lambda launcher, *_: launched.append(launcher.kernel))
    whole = {"amp": "fused", "max_grad_norm": 1.0, "ema_decay": 0.9, "capturable": capturable}
    optimizer = triton_optim.AdamW(two(device, dtype), backend="triton", **whole, **more)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0, device=device), torch.zeros(1, device=device)
    optimizer.step()
    launched.clear()
    with Everything() as asked:
        optimizer.step()
    assert len(launched) == len(set(map(id, launched))) == 3
    assert asked.done == []


@pytest.mark.skipif(HAS_GPU, reason="what the recorder says is the same there")
def test_what_cannot_be_recorded_says_so() -> None:
    recorder = Recorder()
    x = recorder.read("x")
    with recorder:
        for of in (torch.cos, float, bool, lambda x: x.to(torch.int32), lambda x: x + torch.ones(3)):
            with pytest.raises(Unrecorded):
                of(x)
        with pytest.raises(Unrecorded):
            recorder.number_of(x.tolist())
