"""A small convolutional network on MNIST, through torchvision, with AdamW under a one-cycle schedule.

    python examples/mnist.py --root data --download

It is judged beside the simplest reader of digits: the nearest of the ten mean images.
"""

import argparse
import sys

import torch
from data import accuracy
from torch.nn import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential
from torch.nn.functional import cross_entropy

import triton_optim


class MissingError(Exception):
    """What is not there, and how to get it, in one line."""


def load(root, download):
    """Images from 0 to 1 and labels: those to learn, and those to test."""
    try:
        from torchvision.datasets import MNIST
    except (ImportError, RuntimeError) as error:  # built for another torch, it raises RuntimeError
        raise MissingError(f"torchvision cannot be imported ({error}). Install the one for your torch.") from None
    try:
        parts = [MNIST(root, train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        where = f"MNIST cannot be read from {root!r} ({error})".replace("\n", " ")
        raise MissingError(f"{where}. Get its 12 MB with --download, where there is a network.") from None
    return [(part.data[:, None] / 255, part.targets) for part in parts]


def nearest_mean(x, y):
    means = torch.stack([x[y == digit].mean(0).flatten() for digit in range(10)])
    return lambda images: -torch.cdist(images.flatten(1), means)


def main(root="data", download=False, seed=0, steps=200):
    """The share of test digits read right: by the nearest mean image, and by the network."""
    torch.manual_seed(seed)
    (x, y), test = load(root, download)
    model = Sequential(
        *(Conv2d(1, 8, 5, stride=2), ReLU(), Conv2d(8, 16, 3), ReLU(), MaxPool2d(2)),
        *(Flatten(), Linear(400, 10)),
    )
    optimizer = triton_optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        loss = cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    simple, right = accuracy(nearest_mean(x, y), *test), accuracy(model, *test)
    print(f"test digits read right: nearest mean image {simple:.1%}, network {right:.1%}")
    return simple, right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data", help="folder of the data (default: %(default)s)")
    parser.add_argument("--download", action="store_true", help="get the data if it is not there")
    options = parser.parse_args()
    try:
        main(options.root, options.download)
    except MissingError as missing:
        sys.exit(print(f"Skipped: {missing}"))
