"""Linear regression by gradient descent, SGD with Nesterov momentum, beside the closed-form least squares.

    python examples/linear_regression.py

The data: scikit-learn's diabetes, 442 patients with 10 measurements each, standardised. Two of the measurements (total
cholesterol and LDL) say nearly the same, which is a narrow valley: without momentum it takes 6,000 steps, not 400.
"""

import torch
from data import diabetes

import triton_optim


def least_squares(x, y):
    ones = torch.ones(len(x), 1)
    *weights, bias = torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution
    return torch.stack(weights), bias


def main(seed=0, steps=400, momentum=0.95):
    """The smallest loss there is, the loss reached, and the largest error of a weight."""
    torch.manual_seed(seed)
    x, y = diabetes()
    weights, bias = least_squares(x, y)
    best = torch.nn.functional.mse_loss(x @ weights + bias, y).item()

    model = torch.nn.Linear(10, 1)
    optimizer = triton_optim.SGD(model.parameters(), lr=0.1, momentum=momentum, nesterov=momentum > 0)
    for step in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x).squeeze(1), y)
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            error = (model.weight.detach().squeeze(0) - weights).abs().max().item()
            print(f"step {step + 1}: loss {loss.item():.6f}, weights within {error:.1e}")
    print(f"least squares: loss {best:.6f}")
    return best, loss.item(), error


if __name__ == "__main__":
    main()
