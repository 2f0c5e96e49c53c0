"""A race on a task of your own, with an optimizer of your own: a small network on diabetes data, AdamW and signs.

    python examples/race_own.py

The same from the command line, in this folder:

    triton-optim race --task race_own:diabetes_task --optimizers adamw,race_own:SignSGD --lrs 1e-3,1e-2,1e-1
"""

import torch
from data import diabetes
from torch.nn import Linear, ReLU, Sequential
from torch.utils.data import DataLoader, TensorDataset

from triton_optim.race import Task, race


def diabetes_task(seed):
    """How far diabetes went in a year, from 10 measurements; 100 of the 442 patients judge."""
    x, y = diabetes()
    learned = DataLoader(TensorDataset(x[100:], y[100:]), batch_size=32, shuffle=True, drop_last=True)

    def loss(model, batch):
        measured, progress = batch
        return torch.nn.functional.mse_loss(model(measured).squeeze(1), progress)

    model = Sequential(Linear(10, 32), ReLU(), Linear(32, 1))
    return Task(model, learned, loss, validation=[(x[:100], y[:100])], steps=100, threads=1)


class SignSGD(torch.optim.Optimizer):
    """Each step moves every weight by lr, against the sign of its gradient."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad.sign()


def main(out=None):
    """The results, printed as a table; with `out`, a folder, it may be interrupted and goes on."""
    results = race(diabetes_task, ["adamw", SignSGD], ["constant", "cosine"], [1e-3, 1e-2, 1e-1], seeds=2, out=out)
    print(results)
    return results


if __name__ == "__main__":
    main()
