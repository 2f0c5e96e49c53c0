"""Task `quadratic_deep`: DeepOBS' stochastic quadratic of 100 dimensions, whose published results stand beside ours.

Schneider, Balles & Hennig 2019, https://arxiv.org/abs/1903.05499. Eigenvalues, rotation and points are drawn as there,
by NumPy's RandomState from the same seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .names import require
from .task import Published, Task

DIMENSIONS, POINTS, BATCH, EPOCHS = 100, 1000, 128, 100
LARGE = 10  # eigenvalues from 30 to 60; the others are below 1
NOISE = 0.6
# The best of the 36 learning rates, by factors of 10^0.2, that DeepOBS tried.
SGD, MOMENTUM, ADAM = 0.015848931925, 0.0025118864315, 0.039810717055
BASELINES = "DeepOBS, 10 seeds, https://github.com/fsschneider/DeepOBS_Baselines, commit 3da285a"
PUBLISHED = (
    Published("sgd", "constant", SGD, 87.3975, 0.1690, BASELINES),
    Published("sgd(momentum=0.99)", "constant", MOMENTUM, 87.0450, 0.0252, BASELINES),
    Published("adam", "constant", ADAM, 87.1119, 0.0242, BASELINES),
)


def quadratic_deep(seed: int) -> Task:
    """A point in 100 dimensions; 100 epochs of 7 batches of 128 points, each in the one order that the seed gives."""
    hessian, learned, judging = problem()
    order = torch.randperm(POINTS, generator=torch.Generator().manual_seed(seed))
    return Task(
        *(Quadratic(hessian), batches(learned[order]), loss, batches(judging)),
        steps=EPOCHS * (POINTS // BATCH),
        threads=1,
        optimizers=[f"sgd(lr={SGD})", f"sgd(momentum=0.99,lr={MOMENTUM})", f"adam(lr={ADAM})"],
        schedules=["constant"],
        seeds=5,
        lrs={"sgd": SGD, "adam": ADAM, "adamw": ADAM},
        published=PUBLISHED,
    )


class Quadratic(nn.Module):
    """A point that begins at ones, and the Hessian of its loss."""

    hessian: Tensor

    def __init__(self, hessian: Tensor) -> None:
        super().__init__()
        self.register_buffer("hessian", hessian)
        self.point = nn.Parameter(torch.ones(DIMENSIONS))

    def forward(self, x: Tensor) -> Tensor:
        """Of each of a batch of points, half of its squared distance in the Hessian's norm: (batch,)."""
        apart = self.point - x
        distances: Tensor = (apart @ self.hessian * apart).sum(1) / 2
        return distances


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean of the distances."""
    distances: Tensor = model(batch)
    return distances.mean()


def batches(points: Tensor) -> Sequence[Tensor]:
    """Full batches; the rest is left out."""
    return list(points[: POINTS // BATCH * BATCH].view(-1, BATCH, DIMENSIONS))


@cache
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """The Hessian, the points to learn from, and those that judge."""
    require(["numpy"], "The task 'quadratic_deep'")
    import numpy as np

    drawn = np.random.RandomState(42)
    small, large = drawn.uniform(0.0, 1.0, DIMENSIONS - LARGE), drawn.uniform(30.0, 60.0, LARGE)
    turn = rotation(drawn)
    hessian = turn.T @ np.diag(np.concatenate((small, large))) @ turn
    learned, judging = (
        np.random.RandomState(seed).normal(0.0, NOISE, (POINTS, DIMENSIONS)).astype(np.float32) for seed in (42, 43)
    )
    return torch.from_numpy(hessian).float(), torch.from_numpy(learned), torch.from_numpy(judging)


def rotation(drawn: Any) -> Any:
    """A rotation from the Haar measure, by the subgroup algorithm of Diaconis & Shahshahani 1987: one of so many
    dimensions is one of a dimension less, reflected so that its new axis points anywhere.

    Args:
        drawn: NumPy's RandomState, which it draws from.
    """
    import numpy as np

    angle = 2 * np.pi * drawn.uniform()
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for size in range(3, DIMENSIONS + 1):
        axis = drawn.normal(size=(size, 1))
        axis = axis / np.sqrt(axis.T @ axis)
        mirror = np.eye(size, 1) - axis
        mirror = mirror / np.sqrt(mirror.T @ mirror)
        larger = np.eye(size)
        larger[1:, 1:] = turn
        turn = larger - 2 * mirror @ (mirror.T @ larger)
    return -turn
