"""Learning rate and weight decay of AdamW, tuned with Optuna on handwritten digits; trials that lag are pruned.

    python examples/tune_optuna.py --trials 12

The first trial is AdamW as it comes, lr=1e-3 and weight_decay=1e-2. The test digits are looked at once, at the end.
"""

import argparse

import optuna
import torch
from data import accuracy, batches, digits
from torch.nn import Flatten, Linear, ReLU, Sequential
from torch.nn.functional import cross_entropy

import triton_optim

HELD_OUT = 300  # training digits that judge the trials


def train(trial, lr, weight_decay, epochs=6):
    """The model, and the loss on held out digits, which is reported to the trial after every epoch."""
    torch.manual_seed(0)
    x, y, _, _ = digits()
    model = Sequential(Flatten(), Linear(64, 64), ReLU(), Linear(64, 10))
    optimizer = triton_optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    for epoch in range(epochs):
        for images, labels in batches(64, x[HELD_OUT:], y[HELD_OUT:]):
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
        with torch.no_grad():
            loss = cross_entropy(model(x[:HELD_OUT]), y[:HELD_OUT]).item()
        trial.report(loss, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return model, loss


def main(trials=12, seed=0):
    """The study, the test accuracy of AdamW as it comes, and that of the best trial."""
    models = {}

    def objective(trial):
        lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        weight_decay = trial.suggest_float("weight_decay", 1e-4, 1.0, log=True)
        models[trial.number], loss = train(trial, lr, weight_decay)
        return loss

    sampler = optuna.samplers.TPESampler(n_startup_trials=5, seed=seed)
    study = optuna.create_study(sampler=sampler, pruner=optuna.pruners.MedianPruner(n_startup_trials=3))
    study.enqueue_trial({"lr": 1e-3, "weight_decay": 1e-2})
    study.optimize(objective, n_trials=trials)
    best = study.best_trial
    _, _, test_x, test_y = digits()
    before, after = accuracy(models[0], test_x, test_y), accuracy(models[best.number], test_x, test_y)
    pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    print(f"{trials} trials, {pruned} of them pruned; held out loss {study.trials[0].value:.3f} -> {best.value:.3f}")
    print(f"best: {best.params}")
    print(f"test digits read right: {before:.1%} -> {after:.1%}")
    return study, before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=12, help="(default: %(default)s)")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    main(parser.parse_args().trials)
