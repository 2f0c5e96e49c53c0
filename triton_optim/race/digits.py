"""Task `digits`: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, read by a small network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

from .names import require
from .settings import SMALL
from .task import Task

BATCH = 64
VALIDATION = 450  # a quarter


def digits(seed: int) -> Task:
    """A perceptron of two hidden layers; batches of 64 of 1,347 digits, and 450 that judge."""
    x, y = data()
    model = nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()),
        nn.Linear(128, 10),
    )
    validation = [(x[:VALIDATION], y[:VALIDATION])]
    batches = shuffled(x[VALIDATION:], y[VALIDATION:], seed)
    return Task(
        *(model, batches, loss, validation),
        steps=300,
        heads=["5"],
        threads=1,
        lrs=SMALL,
        sampled_loss=sampled_loss,
        samples=BATCH,
    )


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def sampled_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The same with digits that are drawn from what the model says of the images."""
    logits: Tensor = model(batch[0])
    drawn = torch.multinomial(logits.detach().softmax(1), 1).squeeze(1)
    return nn.functional.cross_entropy(logits, drawn)


@cache
def data() -> tuple[Tensor, Tensor]:
    """Images from 0 to 1, and labels, in one random order whatever the seed."""
    require(["sklearn"], "The task 'digits'")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels, dtype=torch.int64)[order]


def shuffled(x: Tensor, y: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Full batches for ever, in an order that the seed gives."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: len(x) // BATCH * BATCH].view(-1, BATCH):
            yield x[rows], y[rows]
