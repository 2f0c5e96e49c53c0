"""An optimizer of your own, of a few lines: SGD with Nesterov's momentum, beside torch's.

    python examples/own_nesterov.py

The rule says what becomes of one element. It runs on every backend, under every option.
"""

from typing import NamedTuple

import torch
from data import accuracy, batches, digits
from torch.nn import Flatten, Linear, ReLU, Sequential
from torch.nn.functional import cross_entropy

import triton_optim
from triton_optim.kernels.language import jit


class Scalars(NamedTuple):
    lr: float
    momentum: float


@jit
def nesterov(p, g, velocity, h):
    velocity = h.momentum * velocity + g
    return p - h.lr * (g + h.momentum * velocity), velocity


class Nesterov(triton_optim.RuleOptimizer):
    rule = nesterov
    states = (triton_optim.State("velocity"),)

    def __init__(self, params, lr=0.1, momentum=0.9, **options):
        super().__init__(params, {"lr": lr, "momentum": momentum}, **options)

    def scalars(self, group, step):
        return Scalars(group["lr"], group["momentum"])


def train(build, epochs=8, seed=0):
    """The share of test digits read right, and the weights."""
    torch.manual_seed(seed)
    x, y, test_x, test_y = digits()
    model = Sequential(Flatten(), Linear(64, 64), ReLU(), Linear(64, 10))
    optimizer = build(model.parameters())
    for _ in range(epochs):
        for images, labels in batches(64, x, y):
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
    return accuracy(model, test_x, test_y), torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def main():
    """Both shares, and how far the weights are apart."""
    own, own_weights = train(Nesterov)
    torchs, weights = train(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True))
    apart = (own_weights - weights).abs().max().item()
    print(f"ours {own:.1%}, torch's {torchs:.1%} of 450 test digits right; weights apart by at most {apart:.1e}")
    return own, torchs, apart


if __name__ == "__main__":
    main()
