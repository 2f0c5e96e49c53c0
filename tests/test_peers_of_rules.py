"""The optimizers that torch lacks against the packages that have them right, where these are installed.

Each walks 300 steps in float64 under a schedule. What other packages have wrong is not here: of ADOPT and Simplified
AdEMAMix there is none in pytorch_optimizer to compare with, and no package has the authors' KL-SOAP.

The extra `test` has the packages of Python alone. timm asks for torchvision, which is of one torch alone, and brings
megabytes: those of its rows run where it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import triton_optim as to

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages' own
STEPS = 300
KOZ, TIMM, FREE = "pytorch_optimizer", "timm.optim", "schedulefree"
PRODIGY, DADAPT, HEAVY = "prodigyopt", "dadaptation", "heavyball"
HOW = {
    KOZ: 'pip install -e ".[test]"',
    TIMM: "pip install timm",
    FREE: 'pip install -e ".[test]"',
    PRODIGY: 'pip install -e ".[test]"',
    DADAPT: 'pip install -e ".[test]"',
    HEAVY: "pip install heavyball",
}
DECOUPLED = {"weight_decouple": True}
# Ours, the package and its class, options of ours, options of theirs.
PAIRS: list[tuple[str, str, str, dict[str, Any], dict[str, Any]]] = [
    ("Adan", KOZ, "Adan", {}, {"weight_decouple": False}),  # which it calls the proximal one
    ("AdEMAMix", KOZ, "AdEMAMix", {"alpha": 5.0}, {"alpha": 5.0, **DECOUPLED}),
    (
        "AdEMAMix",
        KOZ,
        "AdEMAMix",
        {"alpha": 5.0, "alpha_warmup": 200, "beta3_warmup": 200},
        {"alpha": 5.0, "t_alpha_beta3": 200, **DECOUPLED},
    ),
    ("AdaBelief", KOZ, "AdaBelief", {}, {"rectify": False}),
    ("Signum", KOZ, "SignSGD", {}, {}),
    ("Signum", KOZ, "SignSGD", {"momentum": 0.0}, {"momentum": 0.0}),
    ("Tiger", KOZ, "Tiger", {}, {}),
    ("Grams", KOZ, "Grams", {}, {}),
    ("StableAdamW", KOZ, "StableAdamW", {"eps": 1e-8}, {"kahan_sum": False}),
    ("NovoGrad", KOZ, "NovoGrad", {}, {}),
    ("CAME", KOZ, "CAME", {}, {}),
    ("Lion", KOZ, "Lion", {}, {}),
    ("Adan", TIMM, "Adan", {}, {}),
    ("Adan", TIMM, "Adan", {"no_prox": True}, {"no_prox": True}),
    ("ADOPT", TIMM, "Adopt", {}, {"clip_exp": 0.25}),
    ("ADOPT", TIMM, "Adopt", {"decoupled_weight_decay": True}, {"clip_exp": 0.25, "decoupled": True}),
    ("NAdamW", TIMM, "NAdamW", {}, {}),
    ("LaProp", TIMM, "LaProp", {}, {}),
    ("AdaBelief", TIMM, "AdaBelief", {"decoupled_weight_decay": False}, {"rectify": False, "decoupled_decay": False}),
    ("AdamC", TIMM, "AdamWLegacy", {}, {"corrected_weight_decay": True}),
    ("ScheduleFreeAdamW", FREE, "AdamWScheduleFree", {}, {}),
    ("ScheduleFreeAdamW", FREE, "AdamWScheduleFree", *[{"warmup_steps": 40, "r": 1.0, "weight_lr_power": 1.0}] * 2),
    ("ScheduleFreeSGD", FREE, "SGDScheduleFree", {}, {}),
    ("ScheduleFreeSGD", FREE, "SGDScheduleFree", *[{"warmup_steps": 40, "r": 1.0, "weight_lr_power": 1.0}] * 2),
    ("ScheduleFreeRAdam", FREE, "RAdamScheduleFree", {}, {}),
    ("ScheduleFreeRAdam", FREE, "RAdamScheduleFree", *[{"silent_sgd_phase": False, "r": 1.0}] * 2),
    ("Prodigy", PRODIGY, "Prodigy", {}, {}),
    ("Prodigy", PRODIGY, "Prodigy", {"decouple": False, "beta3": 0.8}, {"decouple": False, "beta3": 0.8}),
    (
        "Prodigy",
        PRODIGY,
        "Prodigy",
        {"use_bias_correction": True, "safeguard_warmup": True, "growth_rate": 1.05},
        {"use_bias_correction": True, "safeguard_warmup": True, "growth_rate": 1.05},
    ),
    ("Prodigy", PRODIGY, "Prodigy", *[{"slice_p": 3, "d0": 0.05}] * 2),
    ("Prodigy", PRODIGY, "Prodigy", *[{"slice_p": 2, "d0": 0.05, "decouple": False, "safeguard_warmup": True}] * 2),
    ("DAdaptAdam", DADAPT, "DAdaptAdam", {}, {}),
    ("DAdaptAdam", DADAPT, "DAdaptAdam", {"decouple": True}, {"decouple": True}),
    ("DAdaptSGD", DADAPT, "DAdaptSGD", {"momentum": 0.9}, {"momentum": 0.9}),
    ("DAdaptLion", DADAPT, "DAdaptLion", {"d0": 1e-3}, {"d0": 1e-3}),
    ("SOAP", KOZ, "SOAP", {}, {}),
    ("SOAP", KOZ, "SOAP", *[{"precondition_frequency": 1, "shampoo_beta": 0.8}] * 2),
    (
        "Shampoo",
        KOZ,
        "Shampoo",
        {"betas": (0.0, 1.0), "precondition_frequency": 1, "grafting": None, "eps": 1e-6, "precondition_1d": True},
        {"momentum": 0.0, "weight_decouple": True, "matrix_eps": 1e-6},
    ),
]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Of torch's default dtype are states that are numbers."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def exact_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch_optimizer's SOAP rounds its bases to float32, here to float64, and is then 5e-15 and not 3e-8 off."""

    class Torch:
        float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    if importlib.util.find_spec(KOZ) is not None:
        monkeypatch.setattr(f"{KOZ}.optimizer.soap.torch", Torch())


def change(optimizers: list[Any], mode: str) -> None:
    """Have all train, or evaluate."""
    for optimizer in optimizers:
        getattr(optimizer, mode)()


@pytest.mark.parametrize(
    ("name", "package", "their_name", "own", "theirs"),
    PAIRS,
    ids=[f"{name}-{package}-{'-'.join(own)}" for name, package, _, own, _ in PAIRS],
)
def test_of_300_steps_the_results_are_the_same(
    name: str, package: str, their_name: str, own: dict[str, Any], theirs: dict[str, Any]
) -> None:
    pytest.importorskip(package.partition(".")[0], reason=f"{package} is not installed: {HOW[package]}")
    random = torch.Generator().manual_seed(0)
    ours = [Parameter(torch.randn(shape, generator=random)) for shape in ((4, 3), (5,))]
    others = [Parameter(p.detach().clone()) for p in ours]
    shared = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = [
        getattr(to, name)(ours, **shared, **own, backend="eager"),
        getattr(importlib.import_module(package), their_name)(others, **shared, **theirs),
    ]
    modes = package == FREE
    for step in range(STEPS):
        if modes:
            change(optimizers, "train")
        step_both(step, optimizers, ours, others, random)
        if modes and step % 37 == 0:
            change(optimizers, "eval")
            torch.testing.assert_close(ours, others, rtol=0, atol=1e-13)
    for p, q in zip(ours, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


def walk(optimizers: list[Any], ours: list[Parameter], others: list[Parameter], random: torch.Generator) -> None:
    """300 steps of both under a schedule."""
    for step in range(STEPS):
        step_both(step, optimizers, ours, others, random)


def step_both(
    step: int, optimizers: list[Any], ours: list[Parameter], others: list[Parameter], random: torch.Generator
) -> None:
    """A step of both, of these 300."""
    for p, q in zip(ours, others, strict=True):
        p.grad = 0.3 * p.detach() + torch.randn(p.shape, generator=random)
        q.grad = p.grad.clone()
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.01 * min((step + 1) / 50, 1) * (1 - step / 400)
        optimizer.step()


def twins(shapes: list[tuple[int, ...]], random: torch.Generator) -> tuple[list[Parameter], list[Parameter]]:
    """Parameters, and others of the same values."""
    ours = [Parameter(torch.randn(shape, generator=random)) for shape in shapes]
    return ours, [Parameter(p.detach().clone()) for p in ours]


# Ours, theirs and what these are told, and the shapes that both take.
SCIONS: dict[str, tuple[str, dict[str, Any], list[tuple[int, ...]]]] = {
    "auto": ("AUTO", {}, [(4, 3), (3, 7), (5,), (6, 3, 2, 2), (4, 2, 3)]),
    "spectral": ("SPECTRAL", {}, [(4, 3), (3, 7)]),
    "spectral_max": ("SPECTRAL", {"max_scale": True}, [(4, 3), (3, 7)]),
    "sign": ("SIGN", {}, [(4, 3), (3, 7)]),
    "rows": ("ROW", {}, [(4, 3), (3, 7)]),
    "columns": ("COL", {}, [(4, 3), (3, 7)]),
    "embedding": ("COL", {"transpose": True}, [(4, 3), (3, 7)]),
    "rms": ("BIAS", {}, [(5,)]),
}


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("norm", SCIONS)
def test_scion_takes_the_same_steps(norm: str, constrained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose iteration is told to be of float64, as ours is."""
    module = pytest.importorskip("pytorch_optimizer.optimizer.scion", reason=f"not installed: {HOW[KOZ]}")
    iteration = module.zero_power_via_newton_schulz_5
    monkeypatch.setattr(
        module, "zero_power_via_newton_schulz_5", lambda g, steps: iteration(g, steps, dtype=torch.float64)
    )
    theirs, keywords, shapes = SCIONS[norm]
    random = torch.Generator().manual_seed(0)
    ours, others = twins(shapes, random)
    optimizers = [
        to.Scion(ours, norm=norm, scale=3.0, unconstrained=not constrained, backend="eager"),
        module.SCION(
            others, norm_type=getattr(module.LMONorm, theirs), norm_kwargs=keywords, scale=3.0, constraint=constrained
        ),
    ]
    walk(optimizers, ours, others, random)
    for p, q in zip(ours, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_adamh_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """heavyball's has no first moment, in version 3.2, and its rate in float32."""
    heavyball = pytest.importorskip(HEAVY, reason=f"not installed: {HOW[HEAVY]}")
    monkeypatch.setattr(heavyball.utils, "compile_mode", None)
    random = torch.Generator().manual_seed(0)
    ours, others = twins([(4, 3), (3, 7)], random)
    optimizers = [
        to.AdamH(ours, betas=(0.0, 0.99), backend="eager"),
        heavyball.HyperBallAdamW(others, betas=(0.9, 0.99), storage_dtype="float64"),
    ]
    walk(optimizers, ours, others, random)
    for p, q in zip(ours, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-8)
