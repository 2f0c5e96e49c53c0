"""The data of the examples: all of it comes with scikit-learn or with Python itself."""

import importlib.util
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes, load_digits


def diabetes():
    """442 patients: 10 measurements each, and how far the disease went in a year. All have mean 0 and variance 1."""
    x, y = (torch.tensor(array) for array in load_diabetes(return_X_y=True, scaled=False))
    return ((x - x.mean(0)) / x.std(0)).float(), ((y - y.mean()) / y.std()).float()


def digits(test=450):
    """1,797 handwritten digits of 8 x 8 pixels from 0 to 1, always in the same random order: x, y; test x, test y."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels.reshape(-1, 8, 8), dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    return x[test:], y[test:], x[:test], y[:test]


def batches(size, *tensors):
    """One epoch: the tensors' rows in a new random order, `size` at a time. What is left over is left out."""
    order = torch.randperm(len(tensors[0]))
    for start in range(0, len(order) - size + 1, size):
        rows = order[start : start + size]
        yield tuple(tensor[rows] for tensor in tensors)


@torch.no_grad()
def accuracy(model, x, y):
    return (model(x).argmax(1) == y).float().mean().item()


def source_text(*modules):
    """The source text of modules of the standard library, as numbers below 128."""
    sources = [Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8") for module in modules]
    return torch.tensor(list("".join(sources).encode("ascii", "replace")))
