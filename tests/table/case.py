"""What a row says of an optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from reference_peer import peer_of
from torch import Tensor
from torch.nn import Parameter

import triton_optim


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
    # The states, besides ``step``, that are numbers whatever the parameter's shape, with their dtypes.
    numbers: dict[str, torch.dtype] = field(default_factory=dict)
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
        object.__setattr__(self, "numbers", {"step": torch.float32, **self.numbers})
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
        return self.torchs or peer_of(self.reference, *self.numbers.items())

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
