"""The step beside backward: scaling, clipping and averaging inside the update equal the passes that they replace."""

import copy
import math
from typing import Any

import pytest
import torch
from conftest import CPP, TRITON_LOOPS
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import triton_optim

BF16 = torch.bfloat16
SHAPES = [(64, 70), (33,), (5, 7)]
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (triton_optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "SGD": (triton_optim.SGD, {"lr": 0.1}),
    "momentum": (triton_optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "NAdam": (triton_optim.NAdam, {"lr": 0.01}),
    "Lion": (triton_optim.Lion, {"lr": 0.001}),
    "Adafactor": (triton_optim.Adafactor, {"lr": 0.01}),
}
# Parameter dtype and how it is kept.
KEPT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "bfloat16": (BF16, {"state_dtype": torch.float32}),
    "int8": (torch.float32, {"state_dtype": "int8"}),
    "stochastic": (BF16, {"param_precision": "stochastic", "state_dtype": BF16}),
    "split32": (BF16, {"param_precision": "split32", "state_dtype": torch.float32}),
    "master": (torch.float16, {"param_precision": "master", "state_dtype": torch.float32}),
}
# Clipping differs in the last bit of the coefficient; an update of a rounded value may then round the other way.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 5e-7, BF16: 2**-7, torch.float16: 2**-10}
BACKENDS = ["eager", pytest.param("cpp", marks=CPP), *(["triton"] if TRITON_LOOPS else [])]
SCALE = 1024.0

# None: no scaler. "torch": torch's own, in its ordinary flow. "fused": the optimizer unscales, told of infinities by
# torch's scaler, or finding them itself.
amp = st.sampled_from([None, "torch", "fused", "fused, looking"])
clip = st.sampled_from([None, 0.5, 100.0])
average = st.sampled_from([None, {"ema_decay": 0.9}, {"ema_decay": 0.99, "ema_warmup": True}])
step_with_infinity = st.sampled_from([0, 1, None])
step_without_gradient = st.sampled_from([1, None])
combination = st.tuples(
    st.sampled_from([*RULES]), st.sampled_from([*KEPT]), amp, clip, average, step_with_infinity, step_without_gradient
).filter(lambda chosen: KEPT[chosen[1]][0] != torch.float16 or chosen[2] != "torch")  # torch unscales no float16


def module(dtype: torch.dtype, device: torch.device) -> torch.nn.ParameterList:
    random = torch.Generator().manual_seed(0)
    return torch.nn.ParameterList(Parameter(torch.randn(shape, generator=random).to(device, dtype)) for shape in SHAPES)


def gradients(step: int, like: torch.nn.ParameterList, infinite: bool, missing: bool, scale: float) -> list[Any]:
    random = torch.Generator().manual_seed(1 + step)
    found: list[Any] = []
    for i, p in enumerate(like):
        g = torch.randn(p.shape, generator=random)
        if infinite and i == 1:
            g.view(-1)[3] = math.inf if step % 2 else math.nan
        found.append(None if missing and i == 1 else (g * scale).to(p.device, p.dtype))
    return found


class Plainly:
    """A step as the passes one after the other."""

    def __init__(self, model: torch.nn.ParameterList, optimizer: Any, amp: Any, clip: Any, average: Any) -> None:
        self.model, self.optimizer, self.clip = model, optimizer, clip
        self.scaler = None if amp is None else torch.amp.GradScaler(model[0].device.type, init_scale=SCALE)
        self.average, self.options, self.averages = None, average, 0
        self.norms: list[float] = []

    def step(self) -> None:
        scaled = self.scaler is not None and any(p.grad is not None for p in self.model)
        skipped = False
        if scaled:
            # In float32, as half-precision gradients can't be unscaled where they are.
            inverse = 1 / self.scaler.get_scale()
            skipped = not all(bool(p.grad.isfinite().all()) for p in self.model if p.grad is not None)
            for p in self.model:
                if p.grad is not None:
                    p.grad = p.grad * inverse
        if self.clip is not None:
            self.norms.append(float(torch.nn.utils.clip_grad_norm_(list(self.model), self.clip)))
        if skipped:
            return
        self.optimizer.step()
        if self.options is None:
            return
        if self.average is None:
            self.average = copy.deepcopy(self.model)
            for p in self.average:
                p.grad = None
        decay = self.options["ema_decay"]
        if self.options.get("ema_warmup"):
            decay = min(decay, (1 + self.averages) / (10 + self.averages))
        with torch.no_grad():
            for mean, p in zip(self.average, self.model, strict=True):
                mean.data = mean.data.to(torch.promote_types(p.dtype, torch.float32))
                value = p.detach().to(mean.dtype)
                mean.data = value.clone() if not self.averages else torch.lerp(mean.data, value, 1 - decay)
        self.averages += 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_combination_equals_its_passes(backend: str) -> None:
    # Without shrinking, which would take minutes: a combination is short as it is.
    few = {"eager": 100, "triton": 12, "cpp": 16}[backend]
    phases = (Phase.explicit, Phase.reuse, Phase.generate)

    @settings(max_examples=few, deadline=None, derandomize=True, phases=phases, database=None)
    @given(combination)
    def check(chosen: tuple[Any, ...]) -> None:
        check_combination(backend, *chosen)

    check()


EMA: dict[str, Any] = {"ema_decay": 0.9}
# Each takes graphs of its own. Among them are every rule, codec and option; the passes are run eagerly.
COMPILED: list[tuple[Any, ...]] = [
    ("AdamW", "int8", "fused, looking", 0.5, EMA, 0, 1),
    ("SGD", "float32", "torch", 100.0, EMA | {"ema_warmup": True}, None, None),
    ("momentum", "bfloat16", "fused", 0.5, None, 1, None),
    ("NAdam", "stochastic", "fused", 0.5, EMA, 0, 1),
    ("Lion", "split32", None, 0.5, EMA, None, 1),
    ("AdamW", "master", "fused, looking", None, None, 1, None),
    ("Adafactor", "float64", "torch", 100.0, EMA, 0, None),
]


@pytest.mark.parametrize("chosen", COMPILED, ids=lambda chosen: f"{chosen[0]}-{chosen[1]}")
def test_what_is_compiled_equals_eager_passes(chosen: tuple[Any, ...]) -> None:
    check_combination("compiled", *chosen)


def check_combination(
    backend: str, rule: str, kept: str, amp: Any, clip: Any, average: Any, infinite: Any, missing: Any
) -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    (cls, options), (dtype, precision) = RULES[rule], KEPT[kept]
    if rule == "Adafactor":
        precision = {name: value for name, value in precision.items() if name != "state_dtype"}
    model, own = module(dtype, device), module(dtype, device)
    options = options | precision
    passes = "eager" if backend == "compiled" else backend
    plainly = Plainly(model, cls(model, **options, backend=passes), amp, clip, average)
    options |= average or {}
    in_step = amp if amp in (None, "torch") else "fused"
    fused = cls(own, **options, backend=backend, max_grad_norm=clip, amp=None if in_step == "torch" else in_step)
    scaler = (triton_optim if amp == "fused, looking" else torch.amp).GradScaler(
        device.type, init_scale=SCALE, growth_factor=1 + 1e-12, backoff_factor=1 - 1e-12, enabled=amp is not None
    )
    scaler.scale(torch.zeros(1, device=device))  # makes its tensors
    for k in range(3):
        given = (k, model, k == infinite and amp is not None, k == missing, SCALE if amp is not None else 1.0)
        for p, q, g in zip(model, own, gradients(*given), strict=True):
            p.grad, q.grad = g, None if g is None else g.clone()
        before = [q.grad.clone() if q.grad is not None else None for q in own]
        plainly.step()
        if amp == "torch":
            scaler.unscale_(fused)
        scaler.step(fused)
        scaler.update()
        for q, g in zip(own, before, strict=True):
            if g is not None and amp != "torch":
                assert torch.equal(q.grad.nan_to_num(), g.nan_to_num()), "a gradient was written"
        if clip is not None and fused.grad_norm is not None and math.isfinite(plainly.norms[-1]):
            close(fused.grad_norm.double(), torch.tensor(plainly.norms[-1], dtype=torch.float64), TOLERANCES[dtype])
    for p, q in zip(model, own, strict=True):
        close(q.detach(), p.detach(), TOLERANCES[dtype])
    if average is not None and plainly.average is not None:
        with fused.averaged_parameters():
            for mean, p in zip(plainly.average, own, strict=True):
                close(p.detach(), mean.detach().to(dtype), TOLERANCES[dtype])
    for p, q in zip(model, own, strict=True):
        if "step" in (state := plainly.optimizer.state.get(p, {})):
            assert float(fused.state[q]["step"]) == float(state["step"])


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, check_device=False, equal_nan=True)
