"""Three optimizers, each under three schedules, on handwritten digits: nine loss curves in one picture.

    python examples/compare.py --out compare.png

Two things to try of your own: another line in OPTIMIZERS, and another in SCHEDULES.
"""

import argparse

import torch
from data import accuracy, batches, digits
from matplotlib.figure import Figure
from torch.nn import Flatten, Linear, ReLU, Sequential
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, OneCycleLR

import triton_optim

OPTIMIZERS = {
    "SGD": lambda params: triton_optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: triton_optim.AdamW(params, lr=1e-2),
    "Lion": lambda params: triton_optim.Lion(params, lr=1e-2),
}
SCHEDULES = {
    "constant": lambda optimizer, steps: ConstantLR(optimizer, factor=1.0),
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, T_max=steps),
    "one cycle": lambda optimizer, steps: OneCycleLR(optimizer, optimizer.defaults["lr"], total_steps=steps),
}


def train(build, schedule_for, epochs):
    x, y, test_x, test_y = digits()
    model = Sequential(Flatten(), Linear(64, 64), ReLU(), Linear(64, 10))
    optimizer = build(model.parameters())
    schedule = schedule_for(optimizer, epochs * (len(x) // 64))
    losses = []
    for _ in range(epochs):
        epoch = []
        for images, labels in batches(64, x, y):
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            epoch.append(loss.item())
        losses.append(sum(epoch) / len(epoch))
    return losses, accuracy(model, test_x, test_y)


def main(out, seed=0, epochs=8):
    """For each optimizer and schedule, the mean loss of each epoch, and the share of test digits read right."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    reached = {}
    for axes, (optimizer, build) in zip(figure.subplots(1, 3, sharey=True), OPTIMIZERS.items(), strict=True):
        for schedule, schedule_for in SCHEDULES.items():
            torch.manual_seed(seed)
            losses, right = reached[optimizer, schedule] = train(build, schedule_for, epochs)
            axes.semilogy(range(1, epochs + 1), losses, label=f"{schedule}, {right:.1%} right")
            print(f"{optimizer:5}  {schedule:9}  loss {losses[0]:.3f} -> {losses[-1]:.3f}, {right:.1%} right")
        axes.set(title=optimizer, xlabel="epoch", ylabel="loss")
        axes.legend()
    figure.savefig(out)
    print(f"plot in {out}")
    return reached


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="compare.png", help="where the plot goes (default: %(default)s)")
    main(parser.parse_args().out)
