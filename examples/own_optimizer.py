"""An optimizer of your own on real data: a rule of four lines against AdamW, on handwritten digits.

    python examples/own_optimizer.py

The rule is AdaBelief's (Zhuang et al. 2020, Algorithm 2, https://arxiv.org/abs/2010.07468): Adam, with the squared
distance of the gradient from its average in place of the squared gradient.
"""

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits

import triton_optim as optim
from triton_optim.kernels.language import jit, sqrt


class Scalars(NamedTuple):
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float
    correction: float
    eps: float


@jit
def adabelief(p, g, exp_avg, exp_avg_var, h):
    exp_avg = h.beta1 * exp_avg + h.one_minus_beta1 * g
    surprise = g - exp_avg
    exp_avg_var = h.beta2 * exp_avg_var + h.one_minus_beta2 * (surprise * surprise) + h.eps
    return p - h.step_size * (exp_avg / (sqrt(exp_avg_var) * h.correction + h.eps)), exp_avg, exp_avg_var


class AdaBelief(optim.RuleOptimizer):
    rule = adabelief
    states = (optim.State("exp_avg"), optim.State("exp_avg_var", nonnegative=True))

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-12, **options):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, **options)

    def scalars(self, group, step):
        beta1, beta2 = group["betas"]
        step_size, correction = group["lr"] / (1 - beta1**step), (1 - beta2**step) ** -0.5
        return Scalars(beta1, 1 - beta1, beta2, 1 - beta2, step_size, correction, group["eps"])


def train(optimizer_class):
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    for batch in torch.randperm(1400)[None].repeat(10, 1).reshape(-1, 100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    accuracy = (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
    return accuracy, optimizer


if __name__ == "__main__":
    for optimizer_class in (optim.AdamW, AdaBelief):
        accuracy, optimizer = train(optimizer_class)
        print(f"{optimizer_class.__name__}: {accuracy:.1%} of 397 digits right")
        print(optim.explain(optimizer), end="\n\n")
