"""A learning rate that warms up and then falls along a cosine, and the loss under it, plotted over the steps.

    python examples/plot_schedule.py --out schedule.png

The optimizer's schedules are torch's, used as they are. A new learning rate in every step recompiles nothing.
"""

import argparse

import torch
from data import batches, digits
from matplotlib.figure import Figure
from torch.nn import Flatten, Linear, ReLU, Sequential
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import triton_optim


def train(warmup, epochs):
    x, y, _, _ = digits()
    steps = epochs * (len(x) // 64)
    model = Sequential(Flatten(), Linear(64, 64), ReLU(), Linear(64, 10))
    optimizer = triton_optim.AdamW(model.parameters(), lr=1e-2)
    rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
    fall = CosineAnnealingLR(optimizer, T_max=steps - warmup)
    schedule = SequentialLR(optimizer, [rise, fall], milestones=[warmup])
    learning_rates, losses = [], []
    for _ in range(epochs):
        for images, labels in batches(64, x, y):
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            learning_rates.append(optimizer.param_groups[0]["lr"])
            losses.append(loss.item())
            schedule.step()
    return learning_rates, losses


def main(out, seed=0, warmup=40, epochs=10):
    """The learning rate and the loss of every step; the plot goes to the file `out`."""
    torch.manual_seed(seed)
    learning_rates, losses = train(warmup, epochs)
    figure = Figure(layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    top.plot(learning_rates)
    top.set_ylabel("learning rate")
    bottom.semilogy(losses)
    bottom.set(ylabel="loss", xlabel="step")
    figure.savefig(out)
    print(f"{len(losses)} steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}; plot in {out}")
    return learning_rates, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="schedule.png", help="where the plot goes (default: %(default)s)")
    main(parser.parse_args().out)
