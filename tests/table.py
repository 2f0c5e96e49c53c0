"""One row an optimizer: all that the tests need to know of it. Adding an optimizer is adding its row.

The reference of one that torch has is in references.py, where it is compared with torch's. Of any other it is in
references_more.py or here, above the rows, as references.py says how; the row has steps worked out by hand to compare
it with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import references
import references_more as more
import torch
from conftest import BACKENDS
from reference_peer import NUMBERS as NUMBERS
from reference_peer import peer_of
from references_constrained import (
    ADAMH_BY_HAND,
    MUONH_BY_HAND,
    SCION_BY_HAND,
    adamh,
    muonh,
    scion,
)
from references_eigen import KL_SOAP_BY_HAND, SHAMPOO_BY_HAND, SOAP_BY_HAND, kl_soap, shampoo, soap
from references_matrix import (
    ADAMUON_BY_HAND,
    CAME_BY_HAND,
    NORMUON_BY_HAND,
    RELATIVE_BY_HAND,
    adafactor,
    adafactor_relative,
    adamuon,
    came,
    muon,
    normuon,
)
from references_measured import (
    DADAPT_ADAM_BY_HAND,
    DADAPT_LION_BY_HAND,
    DADAPT_SGD_BY_HAND,
    LAMB_BY_HAND,
    LARS_BY_HAND,
    MARS_ADAMW_BY_HAND,
    MARS_LION_BY_HAND,
    NOVOGRAD_BY_HAND,
    PRODIGY_BY_HAND,
    STABLE_BY_HAND,
    dadapt_adam,
    dadapt_lion,
    dadapt_sgd,
    lamb,
    lars,
    mars_adamw,
    mars_lion,
    novograd,
    prodigy,
    stable_adamw,
)
from references_runner import reference
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.spec import Update


class ByHand(NamedTuple):
    """Steps from p = 1, worked out by hand: with these options, after these gradients, p and the states."""

    options: dict[str, Any]
    gradients: list[Any]
    after: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An optimizer, torch's own if it has one, the float64 reference, and option sets to run."""

    ours: type[triton_optim.RuleOptimizer]
    # What it should compute, in float64 and as the paper has it.
    reference: Callable[..., Any]
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"default": {}})
    # What the reference gives, where torch has no optimizer that it could be compared with.
    by_hand: tuple[ByHand, ...] = ()
    # Options with which no step moves anything.
    still: dict[str, Any] = field(default_factory=lambda: {"lr": 0.0, "weight_decay": 0.0})
    # Options of all property tests: one set, so that the compiled backend compiles each rule once for them.
    settings: dict[str, Any] = field(default_factory=lambda: {"lr": 1e-2, "weight_decay": 0.1})
    # Takes parameters of two dimensions only.
    matrices: bool = False
    # Takes complex parameters.
    complex: bool = True
    # What becomes of an element depends on no other, nor on where in memory it lies.
    elementwise: bool = True
    # Takes sparse gradients only.
    sparse: bool = False
    # Small parameters that it takes. Without, all kinds that it may take, an empty one among them.
    shapes: tuple[tuple[int, ...], ...] = ()
    # float32 against torch's float32 after a few steps on values of order 1: each side rounds, in its own order.
    close: dict[str, float] = field(default_factory=lambda: {"rtol": 1e-5, "atol": 1e-6})
    # Options, tuned once, with which 1,000 steps lead to the minimum of a parabola and of Rosenbrock's function. None
    # of one whose parameters keep their norm: test_constrained.py has a minimum for these.
    minimizes: dict[str, Any] = field(default_factory=lambda: {"lr": 0.1, "betas": (0.9, 0.99)})
    # A representative: tests that are not about backends run it on each, and the other rows eagerly.
    on_every_backend: bool = False

    def __post_init__(self) -> None:
        kinds = {"matrices": ((4, 3), (5, 2), (0, 3), (2, 6)), "sparse": ((4, 3), (5,), (0, 2), (6, 1))}
        kind = "matrices" if self.matrices else "sparse" if self.sparse else ""
        object.__setattr__(self, "shapes", self.shapes or kinds.get(kind, ((4, 3), (5,), (0,), ())))

    @property
    def name(self) -> str:
        return self.ours.__name__

    @property
    def torchs(self) -> type[torch.optim.Optimizer] | None:
        return getattr(torch.optim, self.name, None)

    @property
    def peer(self) -> type[torch.optim.Optimizer]:
        """What stands beside ours: torch's, or the reference in torch's words."""
        return self.torchs or peer_of(self.reference)

    @property
    def counts_steps(self) -> bool:
        """Whether its state holds ``step`` as a tensor. (SparseAdam's is an int.)"""
        return self.ours.counts_steps and not self.sparse

    def peer_takes(self, option: str) -> bool:
        return option in inspect.signature(self.peer).parameters

    def defaults(self) -> dict[str, Any]:
        """The hyperparameters and options of a group."""
        return self.ours(self.parameters(), backend="eager").defaults

    def parameters(
        self,
        device: Any = "cpu",
        dtype: torch.dtype = torch.float32,
        shapes: tuple[tuple[int, ...], ...] | None = None,
        seed: int = 0,
    ) -> list[Parameter]:
        """Normally distributed, the same for the same seed in every dtype. `shapes`: where they are the point."""
        random = torch.Generator().manual_seed(seed)
        parts = torch.complex128 if dtype.is_complex else torch.float64
        return [
            Parameter(torch.randn(shape, generator=random, dtype=parts).to(device, dtype))
            for shape in (self.shapes if shapes is None else shapes)
        ]

    def gradient(self, p: Tensor, random: torch.Generator) -> Tensor:
        """Normally distributed, in the dtype of the parameter; or sparse, with rows given twice or never."""
        if not self.sparse:
            parts = torch.complex128 if p.is_complex() else torch.float64
            return torch.randn(p.shape, generator=random, dtype=parts).to(p.device, p.dtype)
        rows = torch.randint(max(len(p), 1), (1, len(p)), generator=random)
        values = torch.randn(p.shape, generator=random, dtype=torch.float64)
        return torch.sparse_coo_tensor(rows, values, p.shape, check_invariants=True).to(p.device, p.dtype)


def array(g: Tensor | None) -> Any:
    """A gradient as the references take it: a sparse one masked where it holds nothing."""
    if g is None or not g.is_sparse:
        return None if g is None else g.detach().cpu().double().numpy()
    held = torch.sparse_coo_tensor(g._indices(), torch.ones_like(g._values()), g.shape, check_invariants=True)
    plain = g.detach().cpu().double().to_dense().numpy()
    return np.ma.MaskedArray(plain, mask=(held.cpu().to_dense() == 0).numpy())


@reference
def lion(p, g, state, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    """Chen et al. 2023, Algorithm 2. sign(0) is 0, and so is sign(NaN), as torch.sign's."""
    b1, b2 = betas
    m = state.get("exp_avg", 0)
    c = b1 * m + (1 - b1) * g
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    p = p - lr * (np.where(np.isnan(c), 0, np.sign(c)) + decay)
    state["exp_avg"] = b2 * m + (1 - b2) * g
    return p


LION = {"lr": 0.1, "betas": (0.9, 0.5), "weight_decay": 0.5}
ADAN = {"lr": 0.1, "betas": (0.5, 0.5, 0.75), "eps": 1.0, "weight_decay": 5.0}
HALVES = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1.0, "weight_decay": 0.5}
# With these, of the gradients 2 and then 4 the first moments of Adam are 1 and 0.5 + 2, the second ones 1 and 0.75 + 4.
MEAN, ROOT = 2.5 / 0.75, (4.75 / (1 - 0.75**2)) ** 0.5  # of the second step, corrected; of the first both are 2
ADEMAMIX = {**HALVES, "betas": (0.5, 0.75, 0.75)}
SOPHIA = {"lr": 0.1, "betas": (0.5, 0.75), "rho": 0.1, "bs": 2, "weight_decay": 0.5}
# Of these gradients the first update is 2 / 3 + 0.5, which moves x = y = z from 1.
FREE = {**HALVES, "weight_lr_power": 1.0}
FREE_AT = 1 - 0.1 * 7 / 6
FREE_SGD = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.5, "weight_lr_power": 1.0}
# Of beta2 = 0.75 the mean is 7 long at most; in the sixth step it is longer than 4, the first time.
FREE_R = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1.0}
LENGTH = 7 - 12 * 729 / 3367
SIGNUM = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.5}

CASES = [
    Case(
        triton_optim.AdamW,
        references.adamw,
        {
            "default": {},
            "amsgrad": {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1},
            "maximize": {"maximize": True, "betas": (0.8, 0.95), "eps": 1e-6},
        },
        on_every_backend=True,  # as one that counts its steps
        minimizes={"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0},
    ),
    Case(
        triton_optim.Adam,
        references.adam,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1},
            "amsgrad": {"amsgrad": True, "maximize": True, "weight_decay": 0.1},
            "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        },
    ),
    Case(
        triton_optim.SGD,
        references.sgd,
        {
            "default": {},
            "decay": {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
            "momentum": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1},
            "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        },
        settings={"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9},
        on_every_backend=True,  # as one that does not
        minimizes={"lr": 0.003, "momentum": 0.9},
    ),
    Case(
        triton_optim.Lion,
        lion,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.95, 0.98), "maximize": True}},
        by_hand=(
            # Of the first element c = 0.1 * 2, then 0.9 * 1 + 0.1 * -4 = 0.5: sign +1, where that of g and of m is -1.
            # p = 1 - 0.1 * (1 + 0.5 * 1) = 0.85, then 0.85 - 0.1 * (1 + 0.5 * 0.85); m = 1, then 0.5 * 1 + 0.5 * -4.
            # Of the second c = -0.2, then 0.9 * -1 + 0.1 * 18.5 = 0.95; the third has no gradient, and decays alone.
            ByHand(LION, [[2.0, -2.0, 0.0]], {"p": [0.85, 1.05, 0.95], "exp_avg": [1.0, -1.0, 0.0]}),
            ByHand(
                LION,
                [[2.0, -2.0, 0.0], [-4.0, 18.5, 0.0]],
                {"p": [0.7075, 0.8975, 0.9025], "exp_avg": [-1.5, 8.75, 0.0]},
            ),
            # c = 0.1, then 0.9 * 0.01 - 0.1 = -0.091.
            ByHand({}, [1.0], {"p": 0.9999, "exp_avg": 0.01}),
            ByHand({}, [1.0, -1.0], {"p": 1.0, "exp_avg": -1e-4}),
        ),
        minimizes={"lr": 0.02},
    ),
    Case(
        triton_optim.Adan,
        more.adan,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.8, 0.95), "maximize": True},
            "decay first": {"weight_decay": 0.1, "no_prox": True},
        },
        by_hand=(
            # m = 1, v = 0, n = 1, corrected 2, 0 and 4: p = (1 - 0.1 * 2 / (2 + 1)) / (1 + 0.1 * 5)
            ByHand(ADAN, [2.0], {"p": 14 / 22.5, "exp_avg": 1.0, "exp_avg_diff": 0.0, "exp_avg_sq": 1.0}),
            # d = 2: m = 0.5 + 2, v = 0.5 * 2, n = 0.75 * 1 + 0.25 * (4 + 0.5 * 2)^2 = 7, corrected 10/3, 4/3 and 16
            ByHand(
                ADAN,
                [2.0, 4.0],
                {
                    "p": (14 / 22.5 - 0.1 * (10 / 3 + 0.5 * 4 / 3) / (16**0.5 + 1)) / 1.5,
                    "exp_avg": 2.5,
                    "exp_avg_diff": 1.0,
                    "exp_avg_sq": 7.0,
                    "previous_grad": 4.0,
                },
            ),
            ByHand(ADAN | {"no_prox": True}, [2.0], {"p": 0.5 - 0.2 / 3}),
        ),
        minimizes={"lr": 0.2, "betas": (0.9, 0.9, 0.99)},
    ),
    Case(
        triton_optim.AdEMAMix,
        more.ademamix,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9, 0.99), "alpha": 5.0, "maximize": True},
            "warm-up": {"lr": 1e-2, "alpha": 8.0, "beta3_warmup": 7, "alpha_warmup": 4},
        },
        by_hand=(
            # The slow mean is 0.25 * 2, then 0.75 * 0.5 + 0.25 * 4, not corrected.
            ByHand(ADEMAMIX, [2.0], {"p": 1 - 0.1 * (3 / 3 + 0.5), "exp_avg_slow": 0.5, "exp_avg_fast": 1.0}),
            ByHand(
                ADEMAMIX,
                [2.0, 4.0],
                {
                    "p": 0.85 - 0.1 * ((MEAN + 2 * 1.375) / (ROOT + 1) + 0.5 * 0.85),
                    "exp_avg_slow": 1.375,
                    "exp_avg_sq": 4.75,
                },
            ),
            # Half-lives of 1 and 3: in the first of two steps it is 2. alpha is half of 2.
            ByHand(
                {**HALVES, "betas": (0.5, 0.75, 0.5 ** (1 / 3)), "beta3_warmup": 2, "alpha_warmup": 2},
                [2.0],
                {"p": 0.95 - 0.1 * (2 + 2 * (1 - 0.5**0.5)) / 3, "exp_avg_slow": 2 * (1 - 0.5**0.5)},
            ),
        ),
        minimizes={"lr": 0.1, "betas": (0.9, 0.99, 0.95)},
    ),
    Case(
        triton_optim.SimplifiedAdEMAMix,
        more.simplified_ademamix,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "alpha": 2.0, "maximize": True},
            "warm-up": {"beta1_warmup": 5, "bias_correction1": True, "bias_correction2": False},
        },
        by_hand=(
            # m = 2, then 1 + 4.
            ByHand({**HALVES, "alpha": 1.0}, [2.0], {"p": 0.95 - 0.1 * 4 / 3, "exp_avg": 2.0, "num_sum": 1.0}),
            ByHand(
                {**HALVES, "alpha": 1.0},
                [2.0, 4.0],
                {"p": (0.95 - 0.4 / 3) * 0.95 - 0.1 * 9 / (ROOT + 1), "exp_avg": 5.0, "num_sum": 1.5},
            ),
            ByHand(
                {**HALVES, "alpha": 1.0, "bias_correction1": True, "bias_correction2": False},
                [2.0, 4.0],
                {"p": (0.95 - 0.1 * 4 / 1.5) * 0.95 - 0.1 * 9 / 1.5 / (4.75**0.5 + (7 / 16) ** 0.5)},
            ),
            # A half-life of 1 that becomes 3 in two steps: 2 in the first, and 3 in the second.
            ByHand(
                {"betas": (0.5 ** (1 / 3), 0.75), "min_beta1": 0.5, "beta1_warmup": 2, "lr": 0.0},
                [2.0, 4.0],
                {"exp_avg": 2 * 0.5 ** (1 / 3) + 4},
            ),
        ),
        minimizes={"lr": 0.02, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.ADOPT,
        more.adopt,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "maximize": True},
            "decoupled": {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True, "eps": 0.5},
            "not clipped": {"lr": 1e-2, "clip_exp": None, "betas": (0.8, 0.95)},
        },
        by_hand=(
            # The first step sets v = 4; then 8 / 2 is clipped to 1 and 100 / sqrt(19) to 2^0.25.
            ByHand({**HALVES, "weight_decay": 0}, [2.0], {"p": 1.0, "exp_avg": 0.0, "exp_avg_sq": 4.0}),
            ByHand({**HALVES, "weight_decay": 0}, [2.0, 1.0], {"p": 0.975, "exp_avg": 0.25, "exp_avg_sq": 3.25}),
            ByHand({**HALVES, "weight_decay": 0}, [2.0, -8.0], {"p": 1.05, "exp_avg": -0.5, "exp_avg_sq": 19.0}),
            ByHand({**HALVES, "weight_decay": 0}, [2.0, 8.0, 100.0], {"exp_avg": 0.25 + 0.5 * 2**0.25}),
            ByHand({**HALVES, "weight_decay": 0, "clip_exp": None}, [2.0, 8.0], {"exp_avg": 2.0}),
            # g = 2 + 0.5, then 1 + 0.5
            ByHand(HALVES, [2.0, 1.0], {"p": 1 - 0.1 * 0.5 * 1.5 / 2.5, "exp_avg_sq": 0.75 * 6.25 + 0.25 * 2.25}),
            ByHand({**HALVES, "decoupled_weight_decay": True}, [2.0, 1.0], {"p": 0.95 - 0.025, "exp_avg_sq": 3.25}),
        ),
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.NAdamW,
        more.nadamw,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "maximize": True}},
        by_hand=(
            # 0.5 * 1 + 0.5 * 2 = 1.5, corrected 3; then 0.5 * 2.5 + 0.5 * 4 = 3.25, over 0.75
            ByHand(HALVES, [2.0], {"p": 0.95 - 0.1 * 3 / 3, "exp_avg": 1.0, "exp_avg_sq": 1.0}),
            ByHand(
                HALVES,
                [2.0, 4.0],
                {"p": 0.85 * 0.95 - 0.1 * 3.25 / 0.75 / (ROOT + 1), "exp_avg": 2.5, "exp_avg_sq": 4.75},
            ),
        ),
        minimizes={"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0},
    ),
    Case(
        triton_optim.AdamAtan2,
        more.adam_atan2,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "b": 0.5, "maximize": True}},
        by_hand=(
            # m = v = 1, corrected 2 and 2 * 2: a parameter goes by lr * a * pi / 4, whatever its gradient is.
            ByHand(
                {"lr": 0.1, "betas": (0.5, 0.75), "weight_decay": 0.5, "a": 2.0},
                [2.0],
                {"p": 0.95 - 0.1 * 2 * np.pi / 4, "exp_avg": 1.0, "exp_avg_sq": 1.0},
            ),
            # Then m = 0.5 * 1 + 0.5 * -1 = 0, and nothing moves.
            ByHand(
                {"lr": 0.1, "betas": (0.5, 0.75), "a": 2.0},
                [2.0, -1.0],
                {"p": 1 - 0.1 * 2 * np.pi / 4, "exp_avg": 0.0, "exp_avg_sq": 1.0},
            ),
        ),
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.LaProp,
        more.laprop,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "maximize": True}},
        by_hand=(
            # 2 / (2 + 1) enters the mean with lr 0.1, and 4 / (ROOT + 1) with lr 0.2; that of lr is 0.05, then 0.125.
            ByHand(HALVES, [2.0], {"p": (1 - 0.1 * 2 / 3) * 0.95, "exp_avg": 0.1 / 3, "exp_avg_lr": 0.05}),
            ByHand(
                {**HALVES, "lr": lambda index: (0.1, 0.2)[index]},
                [2.0, 4.0],
                {
                    "p": ((1 - 0.2 / 3) * 0.95 - 0.2 / 0.125 * (0.05 / 3 + 0.1 * 4 / (ROOT + 1))) * 0.9,
                    "exp_avg": 0.05 / 3 + 0.1 * 4 / (ROOT + 1),
                    "exp_avg_lr": 0.125,
                },
            ),
        ),
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.AdaBelief,
        more.adabelief,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-8, "maximize": True},
            "coupled": {"weight_decay": 0.1, "decoupled_weight_decay": False, "eps": 1e-4},
        },
        by_hand=(
            # s = 0.25 * (2 - 1)^2 + 1, then 0.75 * 1.25 + 0.25 * (4 - 2.5)^2 + 1
            ByHand(HALVES, [2.0], {"p": 0.95 - 0.1 * 2 / (5**0.5 + 1), "exp_avg": 1.0, "exp_avg_var": 1.25}),
            ByHand(
                HALVES,
                [2.0, 4.0],
                {
                    "p": (0.95 - 0.2 / (5**0.5 + 1)) * 0.95 - 0.1 * MEAN / ((40 / 7) ** 0.5 + 1),
                    "exp_avg_var": 2.5,
                },
            ),
            # g = 2 + 0.5
            ByHand(
                {**HALVES, "decoupled_weight_decay": False},
                [2.0],
                {"p": 1 - 0.1 * 2.5 / ((1.25**2 + 4) ** 0.5 + 1), "exp_avg": 1.25},
            ),
        ),
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.Signum,
        more.signum,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.5, "maximize": True},
            "signSGD": {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.0},
        },
        by_hand=(
            # m = 1, -1, 0, then -1.5, 0, 0.
            ByHand(SIGNUM, [[2.0, -2.0, 0.0]], {"p": [0.85, 1.05, 0.95], "exp_avg": [1.0, -1.0, 0.0]}),
            ByHand(
                SIGNUM,
                [[2.0, -2.0, 0.0], [-4.0, 1.0, 0.0]],
                {"p": [0.9075, 0.9975, 0.9025], "exp_avg": [-1.5, 0.0, 0.0]},
            ),
            ByHand({**SIGNUM, "momentum": 0.0}, [[2.0, 0.0], [-0.5, 0.5]], {"p": [0.9075, 0.8025]}),
        ),
        minimizes={"lr": 0.02},
    ),
    Case(
        triton_optim.Tiger,
        more.tiger,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "beta": 0.5, "maximize": True}},
        by_hand=(
            ByHand({"lr": 0.1, "beta": 0.75, "weight_decay": 0.5}, [2.0], {"p": 0.85, "exp_avg": 0.5}),
            # m = 0.375 - 0.25 is positive yet.
            ByHand({"lr": 0.1, "beta": 0.75, "weight_decay": 0.5}, [2.0, -1.0], {"p": 0.7075, "exp_avg": 0.125}),
        ),
        minimizes={"lr": 0.02, "beta": 0.9, "weight_decay": 0.0},
    ),
    Case(
        triton_optim.Grams,
        more.grams,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "maximize": True}},
        by_hand=(
            # m = 1, then 0.25, over 0.75; v = 1, then 0.75 + 0.0625, over 7/16. The sign is that of -0.5.
            ByHand(HALVES, [2.0], {"p": 0.95 - 0.1 * 2 / 3, "exp_avg": 1.0, "exp_avg_sq": 1.0}),
            ByHand(
                HALVES,
                [2.0, -0.5],
                {"p": (0.95 - 0.2 / 3) * 0.95 + 0.1 / 3 / ((13 / 7) ** 0.5 + 1), "exp_avg": 0.25},
            ),
        ),
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.AdamC,
        more.adamc,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "max_lr": 0.05, "maximize": True},
        },
        by_hand=(
            # The decay is 0.1 * 0.1 / 0.4 * 2 = 0.05.
            ByHand({**HALVES, "weight_decay": 2.0, "max_lr": 0.4}, [2.0], {"p": 0.95 - 0.1 * 2 / 3, "exp_avg": 1.0}),
            ByHand(
                {**HALVES, "weight_decay": 2.0, "max_lr": 0.4},
                [2.0, 4.0],
                {"p": (0.95 - 0.2 / 3) * 0.95 - 0.1 * MEAN / (ROOT + 1), "exp_avg": 2.5, "exp_avg_sq": 4.75},
            ),
            ByHand(HALVES, [2.0], {"p": 0.95 - 0.1 * 2 / 3}),
        ),
        still={"lr": 0.0, "weight_decay": 0.0, "max_lr": 1e-3},  # one of 0 is refused
        settings={"lr": 1e-2, "weight_decay": 0.1, "max_lr": 2e-2},
        minimizes={"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0},
    ),
    Case(
        triton_optim.SophiaG,
        more.sophia,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9), "maximize": True},
        },
        by_hand=(
            ByHand(SOPHIA, [2.0], {"p": 0.85, "exp_avg": 1.0, "hessian": 0.0}),
            ByHand(SOPHIA, [2.0, -1.0], {"p": 0.85 * 0.95, "exp_avg": 0.0}),  # test_sophia.py has estimates
        ),
        minimizes={"lr": 0.02, "weight_decay": 0.0},
    ),
    Case(
        triton_optim.ScheduleFreeAdamW,
        more.schedule_free_adamw,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "r": 1.0, "maximize": True},
            "warm-up": {"lr": 1e-2, "warmup_steps": 4, "eps": 1e-4, "weight_lr_power": 1.0},
        },
        by_hand=(
            ByHand(FREE, [2.0], {"p": FREE_AT, "z": FREE_AT, "exp_avg_sq": 1.0, "weight_sum": 0.1}),
            # The weights are 0.1 and 0.3: z moves by -0.3 u, x by 3/4 of that, and y is half of each.
            ByHand(
                {**FREE, "lr": lambda index: (0.1, 0.3)[index]},
                [2.0, 4.0],
                {
                    "p": FREE_AT - 0.3 * 0.875 * (4 / (ROOT + 1) + 0.5 * FREE_AT),
                    "z": FREE_AT - 0.3 * (4 / (ROOT + 1) + 0.5 * FREE_AT),
                    "lr_max": 0.3,
                },
            ),
            # In two steps to 0.1, with weights 1 * 0.05^2 and 2 * 0.1^2: 8/9 of the sum.
            ByHand(
                {**HALVES, "warmup_steps": 2, "r": 1.0, "weight_decay": 0.0},
                [2.0, 4.0],
                {"p": 1 - 0.1 / 3 - 0.1 * 17 / 18 * 4 / (ROOT + 1), "weight_sum": 0.0225},
            ),
        ),
        minimizes={"lr": 0.3, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.ScheduleFreeSGD,
        more.schedule_free_sgd,
        {
            "default": {},
            "decay": {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.8, "r": 1.0, "maximize": True},
            "warm-up": {"lr": 0.1, "warmup_steps": 4, "weight_lr_power": 1.0},
        },
        by_hand=(
            ByHand(FREE_SGD, [2.0], {"p": 0.75, "z": 0.75, "weight_sum": 0.1}),
            # u = 4 + 0.5 * 0.75; with weights 0.1 and 0.3 x moves by 3/4 of z's step.
            ByHand(
                {**FREE_SGD, "lr": lambda index: (0.1, 0.3)[index]},
                [2.0, 4.0],
                {"p": 0.75 - 0.3 * 0.875 * 4.375, "z": 0.75 - 0.3 * 4.375, "lr_max": 0.3},
            ),
            # z = 0, x = (1 + 0) / 2: the mean of the points that z came to is 0.5, and y is half of it.
            ByHand({"momentum": 0.5}, [0.0, 1.0], {"p": 0.25, "z": 0.0}),
            ByHand({"lr": 0.5, "warmup_steps": 2, "r": 1.0}, [4.0, 0.0], {"p": 0.0, "weight_sum": 0.5625}),
        ),
        minimizes={"lr": 0.005, "momentum": 0.9, "r": 5.0},
    ),
    Case(
        triton_optim.ScheduleFreeRAdam,
        more.schedule_free_radam,
        {
            "default": {"betas": (0.9, 0.95)},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9), "r": 1.0, "maximize": True},
            "SGD first": {"lr": 1e-2, "weight_decay": 0.1, "silent_sgd_phase": False, "weight_lr_power": 1.0},
        },
        by_hand=(
            ByHand(FREE_R, [2.0, 4.0], {"p": 1.0, "z": 1.0, "exp_avg_sq": 4.75, "weight_sum": 0.0, "lr_max": 0.0}),
            # z = 0.8, then 0.4; x is the mean of both, and y half of x and half of z.
            ByHand({**FREE_R, "silent_sgd_phase": False}, [2.0, 4.0], {"p": 0.5, "z": 0.4, "weight_sum": 0.02}),
            ByHand(
                FREE_R,
                [0.0, 0.0, 0.0, 0.0, 0.0, 2.0],
                {
                    "p": 1
                    - 0.1
                    * ((LENGTH - 4) * (LENGTH - 2) * 7 / (3 * 5 * LENGTH)) ** 0.5
                    * 2
                    / ((4096 / 3367) ** 0.5 + 1),
                    "exp_avg_sq": 1.0,
                },
            ),
        ),
        settings={"lr": 1e-2, "weight_decay": 0.1, "silent_sgd_phase": False},  # the first steps move something
        minimizes={"lr": 0.3, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.Adadelta,
        references.adadelta,
        {"default": {}, "decay": {"lr": 0.1, "rho": 0.8, "weight_decay": 0.1, "maximize": True}},
        minimizes={"lr": 3.0},
    ),
    Case(
        triton_optim.Adagrad,
        references.adagrad,
        {
            "default": {},
            "decays": {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "maximize": True},
            "accumulated": {"initial_accumulator_value": 0.5, "eps": 1e-5},
        },
        minimizes={"lr": 1.5},
    ),
    Case(
        triton_optim.Adamax,
        references.adamax,
        {"default": {}, "decay": {"betas": (0.8, 0.9), "weight_decay": 0.1, "maximize": True}},
        minimizes={"lr": 0.3, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.ASGD,
        references.asgd,
        {"default": {}, "averaged": {"lr": 0.1, "lambd": 0.1, "t0": 5, "weight_decay": 0.1, "maximize": True}},
        minimizes={"lr": 0.005, "lambd": 0.0},
    ),
    Case(
        triton_optim.NAdam,
        references.nadam,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "momentum_decay": 0.1, "maximize": True},
            "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        },
        on_every_backend=True,  # as one that carries a number besides
        minimizes={"lr": 0.07, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.RAdam,
        references.radam,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "maximize": True},
            "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        },
        minimizes={"lr": 0.005, "betas": (0.9, 0.9)},
    ),
    Case(
        triton_optim.RMSprop,
        references.rmsprop,
        {
            "default": {},
            "momentum": {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
            "centered": {"centered": True, "alpha": 0.9},
            "centered momentum": {"centered": True, "alpha": 0.9, "momentum": 0.9, "weight_decay": 0.1},
        },
        settings={"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9},
        minimizes={"lr": 0.1, "momentum": 0.9},
    ),
    Case(
        triton_optim.Rprop,
        references.rprop,
        {"default": {}, "narrow": {"etas": (0.4, 1.5), "step_sizes": (1e-3, 0.02), "maximize": True}},
        still={"lr": 0.0, "step_sizes": (0.0, 50.0)},
        settings={"lr": 1e-2},
        minimizes={"lr": 0.1, "etas": (0.7, 1.2)},
    ),
    Case(
        triton_optim.Adafactor,
        adafactor,
        {
            "default": {},
            "decay": {"lr": 0.1, "beta2_decay": -0.5, "weight_decay": 0.1, "maximize": True},
            "clipped": {"d": 1.5, "eps": (1e-4, 1e-2)},
        },
        complex=False,
        elementwise=False,
        shapes=((4, 3), (5,), (2, 3, 4), ()),  # torch divides by the number of elements
        minimizes={"lr": 0.02, "eps": (None, 1.0), "beta2_decay": -0.5},
    ),
    Case(
        triton_optim.Muon,
        muon,
        {
            "default": {},
            "plain": {"lr": 1e-2, "momentum": 0.8, "nesterov": False},
            "like AdamW": {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 4, "weight_decay": 0.0},
        },
        matrices=True,
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.03, "weight_decay": 0.0},
    ),
    Case(
        triton_optim.NorMuon,
        normuon,
        {
            "default": {},
            "plain": {"lr": 1e-2, "momentum": 0.8, "nesterov": False, "beta2": 0.8, "maximize": True},
            "like AdamW": {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 4, "weight_decay": 0.0},
        },
        by_hand=tuple(ByHand(*steps) for steps in NORMUON_BY_HAND),
        matrices=True,
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.03, "weight_decay": 0.0},
    ),
    Case(
        triton_optim.AdaMuon,
        adamuon,
        {
            "default": {},
            "plain": {"lr": 1e-2, "momentum": 0.8, "nesterov": False, "beta2": 0.8, "maximize": True},
        },
        by_hand=tuple(ByHand(*steps) for steps in ADAMUON_BY_HAND),
        matrices=True,
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.1, "weight_decay": 0.0},
    ),
    Case(
        triton_optim.LAMB,
        lamb,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "maximize": True},
            "without trust": {"trust_ratio": False, "eps": 1e-3},
        },
        by_hand=tuple(ByHand(*steps) for steps in LAMB_BY_HAND),
        on_every_backend=True,  # as one that measures
        elementwise=False,
        minimizes={"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0},
    ),
    Case(
        triton_optim.LARS,
        lars,
        {
            "default": {},
            "decay": {"lr": 0.5, "weight_decay": 0.1, "trust_coefficient": 0.1, "dampening": 0.1, "maximize": True},
            "nesterov": {"lr": 0.5, "nesterov": True, "trust_coefficient": 0.1},
            "plain": {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.1},
            "without trust": {"lr": 0.1, "trust_ratio": False},
        },
        by_hand=tuple(ByHand(*steps) for steps in LARS_BY_HAND),
        settings={"lr": 1e-2, "weight_decay": 0.1, "trust_coefficient": 1.0},
        elementwise=False,
        minimizes={"lr": 0.03, "trust_coefficient": 0.3},
    ),
    Case(
        triton_optim.NovoGrad,
        novograd,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.7), "eps": 1e-3, "maximize": True},
            "averaged": {"lr": 1e-2, "grad_averaging": True},
        },
        by_hand=tuple(ByHand(*steps) for steps in NOVOGRAD_BY_HAND),
        elementwise=False,
        minimizes={"lr": 0.03, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.MARSAdamW,
        mars_adamw,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9), "gamma": 0.5, "maximize": True},
            "vectors, too": {"optimize_1d": True, "eps": 1e-6},
        },
        by_hand=tuple(ByHand(*steps) for steps in MARS_ADAMW_BY_HAND),
        elementwise=False,
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.MARSLion,
        mars_lion,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "beta": 0.8, "gamma": 0.5, "maximize": True}},
        by_hand=tuple(ByHand(*steps) for steps in MARS_LION_BY_HAND),
        elementwise=False,
        minimizes={"lr": 0.02, "beta": 0.9},
    ),
    Case(
        triton_optim.StableAdamW,
        stable_adamw,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.7), "eps": 1e-3, "maximize": True}},
        by_hand=tuple(ByHand(*steps) for steps in STABLE_BY_HAND),
        elementwise=False,
        minimizes={"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0},
    ),
    Case(
        triton_optim.Prodigy,
        prodigy,
        {
            "default": {"d0": 1e-3},
            "decay": {"lr": 0.5, "weight_decay": 0.1, "betas": (0.8, 0.9), "d0": 0.01, "maximize": True},
            "coupled": {"weight_decay": 0.1, "decouple": False, "beta3": 0.8, "d_coef": 0.5, "d0": 0.1},
            "corrected": {"use_bias_correction": True, "safeguard_warmup": True, "growth_rate": 1.1, "d0": 0.01},
            "sampled": {"slice_p": 3, "weight_decay": 0.1, "decouple": False, "d0": 0.01, "maximize": True},
        },
        by_hand=tuple(ByHand(*steps) for steps in PRODIGY_BY_HAND),
        settings={"lr": 0.5, "weight_decay": 0.1, "d0": 0.01},
        elementwise=False,
        minimizes={"lr": 1.0, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.DAdaptAdam,
        dadapt_adam,
        {
            "default": {"d0": 1e-3},
            "decay": {"lr": 0.5, "weight_decay": 0.1, "betas": (0.8, 0.9), "d0": 0.01, "maximize": True},
            "decoupled": {"weight_decay": 0.1, "decouple": True, "layer_scale": 0.5, "d0": 0.01, "growth_rate": 1.1},
            "corrected": {"use_bias_correction": True, "d0": 0.01},
        },
        by_hand=tuple(ByHand(*steps) for steps in DADAPT_ADAM_BY_HAND),
        settings={"lr": 0.5, "weight_decay": 0.1, "d0": 0.01},
        elementwise=False,
        minimizes={"lr": 1.0, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.DAdaptSGD,
        dadapt_sgd,
        {
            "default": {"d0": 1e-3},
            "decay": {"lr": 0.5, "weight_decay": 0.1, "momentum": 0.8, "d0": 0.01, "maximize": True},
            "bounded": {"d0": 0.01, "growth_rate": 1.1},
        },
        by_hand=tuple(ByHand(*steps) for steps in DADAPT_SGD_BY_HAND),
        settings={"lr": 0.5, "weight_decay": 0.1, "d0": 0.01},
        elementwise=False,
        minimizes={"lr": 1.0, "momentum": 0.9},
    ),
    Case(
        triton_optim.DAdaptLion,
        dadapt_lion,
        {
            "default": {"d0": 1e-3},
            "decay": {"lr": 0.5, "weight_decay": 0.1, "betas": (0.8, 0.9), "d0": 0.01, "maximize": True},
        },
        by_hand=tuple(ByHand(*steps) for steps in DADAPT_LION_BY_HAND),
        settings={"lr": 0.5, "weight_decay": 0.1, "d0": 0.01},
        elementwise=False,
        minimizes={"lr": 0.3, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.CAME,
        came,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.7, 0.9), "maximize": True},
            "clipped": {"lr": 1e-2, "clip_threshold": 0.3, "eps": (1e-4, 1e-2)},
        },
        by_hand=tuple(ByHand(*steps) for steps in CAME_BY_HAND),
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.03, "betas": (0.9, 0.99, 0.999)},
    ),
    Case(
        triton_optim.AdafactorRelative,
        adafactor_relative,
        {
            "default": {},
            "decay": {"decay_rate": -0.5, "weight_decay": 0.1, "maximize": True},
            "momentum": {"lr": 1e-2, "beta1": 0.8, "scale_parameter": False, "weight_decay": 0.1},
            "clipped": {"clip_threshold": 0.5, "eps": (1e-4, 1e-2), "beta1": 0.5},
        },
        by_hand=tuple(ByHand(*steps) for steps in RELATIVE_BY_HAND),
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.02, "eps": (1e-30, 1.0), "decay_rate": -0.5},
    ),
    Case(
        triton_optim.SparseAdam,
        references.sparse_adam,
        {"default": {}, "maximize": {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "maximize": True}},
        still={"lr": 1e-30},  # 0 is refused
        settings={"lr": 1e-2},
        complex=False,
        sparse=True,
    ),
    Case(
        triton_optim.MuonH,
        muonh,
        {
            "default": {},
            "plain": {"lr": 0.02, "momentum": 0.8, "nesterov": False, "ns_steps": 4, "maximize": True},
        },
        by_hand=tuple(ByHand(*steps) for steps in MUONH_BY_HAND),
        still={"lr": 0.0},
        settings={"lr": 1e-2},
        matrices=True,
        complex=False,
        elementwise=False,
        minimizes={},
    ),
    Case(
        triton_optim.AdamH,
        adamh,
        {
            "default": {},
            "far": {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "maximize": True},
        },
        by_hand=tuple(ByHand(*steps) for steps in ADAMH_BY_HAND),
        still={"lr": 0.0},
        settings={"lr": 1e-2},
        elementwise=False,
        minimizes={},
    ),
    Case(
        triton_optim.Scion,
        scion,
        {
            "default": {},
            "unconstrained": {"lr": 1e-2, "momentum": 0.5, "unconstrained": True, "scale": 3.0, "maximize": True},
        },
        by_hand=tuple(ByHand(*steps) for steps in SCION_BY_HAND),
        still={"lr": 0.0},
        settings={"lr": 1e-2, "scale": 2.0},
        complex=False,
        elementwise=False,
        shapes=((4, 3), (5,), (2, 3, 4), ()),
        minimizes={"lr": 0.03, "unconstrained": True},
    ),
    Case(
        triton_optim.SOAP,
        soap,
        {  # longer sides would have several eigenvalues of 0, whose eigenvectors may be any
            "default": {"max_precond_dim": 6},
            "often": {
                "lr": 1e-2,
                "betas": (0.8, 0.9),
                "shampoo_beta": 0.7,
                "precondition_frequency": 2,
                "max_precond_dim": 6,
                "maximize": True,
            },
            "one size": {"max_precond_dim": 6, "normalize_grads": True, "correct_bias": False, "weight_decay": 0.1},
        },
        by_hand=tuple(ByHand(*steps) for steps in SOAP_BY_HAND),
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.KLSOAP,
        kl_soap,
        {
            "default": {"max_precond_dim": 6},
            "often": {
                "lr": 1e-2,
                "betas": (0.8, 0.9),
                "shampoo_beta": 0.7,
                "precondition_frequency": 2,
                "max_precond_dim": 6,
                "maximize": True,
                "correct_bias": True,
            },
        },
        by_hand=tuple(ByHand(*steps) for steps in KL_SOAP_BY_HAND),
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.Shampoo,
        shampoo,
        {
            "default": {"max_precond_dim": 6},
            "often": {
                "lr": 1e-2,
                "betas": (0.8, 0.9),
                "precondition_frequency": 2,
                "start_preconditioning_step": 3,
                "max_precond_dim": 6,
                "maximize": True,
                "weight_decay": 0.1,
            },
            "sums": {
                "betas": (0.8, 1.0),
                "precondition_frequency": 1,
                "max_precond_dim": 6,
                "grafting": None,
                "eps": 1e-3,
            },
            "like SGD": {"precondition_frequency": 3, "max_precond_dim": 6, "grafting": "sgd"},
            "blocks": {"precondition_frequency": 2, "block_size": 2, "betas": (0.8, 0.9), "weight_decay": 0.1},
        },
        by_hand=tuple(ByHand(*steps) for steps in SHAMPOO_BY_HAND),
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
]

REFERENCES = {case.name: case.reference for case in CASES}


def rows(*cases: Case) -> pytest.MarkDecorator:
    """A test for each of these rows."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def rows_and_backends(*cases: Case) -> pytest.MarkDecorator:
    """For what is torch.optim.Optimizer's rather than a rule's: each row eagerly, some on the other backends too."""
    return pytest.mark.parametrize(
        ("case", "backend"),
        [
            pytest.param(case, *backend.values, marks=backend.marks, id=f"{case.name}-{backend.values[0]}")
            for case in cases
            for backend in BACKENDS
            if backend.values[0] == "eager" or case.on_every_backend
        ],
    )


def kind(case: Case) -> tuple[Any, ...]:
    """What the code around a rule can tell of an optimizer: two rows that are alike in it take the same ways there."""
    ours = case.ours
    optimizer = ours(case.parameters(), **case.settings, backend="eager")
    return (
        (case.matrices, case.sparse, case.complex),
        (case.counts_steps, bool(optimizer.first_scalar_states(optimizer.param_groups[0]))),
        (ours.prologue is not Update.prologue, bool(optimizer.variant(optimizer.param_groups[0]).state_names)),
        (ours.factors is not Update.factors, ours.total is not Update.total, bool(ours.kept_states)),
        ours.sparse_gradients is not Update.sparse_gradients,
        # States at once, and not of zeros.
        (bool(optimizer.state), any(state.start != 0.0 for state in ours.declared.values())),
    )


def of_each_kind(cases: Iterable[Case]) -> list[Case]:
    """A row of each kind: for what is not a rule's, and hence the same for all rows of a kind."""
    first = {kind(case): case for case in reversed([*cases])}
    first |= {kind(case): case for case in cases if case.on_every_backend}
    return [case for case in cases if case in first.values()]


# What a parameter without a gradient becomes in a step of one that sums over the model is told in test_distance.py.
KINDS = of_each_kind([case for case in CASES if case.ours.total is Update.total])

# For parametrize(*OPTIONS_OF_KINDS): every option set of a row of each kind. What takes seconds runs representatives.
OPTIONS_OF_KINDS = (
    ("case", "options", "backend"),
    [
        pytest.param(case, options, *backend.values, marks=backend.marks, id=f"{backend.values[0]}-{case.name}-{name}")
        for case in KINDS
        for name, options in case.variants.items()
        for backend in BACKENDS
        if case.on_every_backend or backend.values[0] in ("eager", "cpp")
    ],
)

each_case = rows(*CASES)
each_case_and_backend = rows_and_backends(*CASES)
each_kind = rows(*KINDS)
each_kind_and_backend = rows_and_backends(*KINDS)
