"""Logistic regression of handwritten digits by L-BFGS, which evaluates the loss itself, through a closure.

    python examples/lbfgs_closure.py

The loss is convex, so there is one right answer: scikit-learn's LogisticRegression is asked for it as well.
"""

import torch
from data import accuracy, digits
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy

import triton_optim


def main(seed=0, steps=3):
    """The loss, and the accuracy on test digits: scikit-learn's, then ours; and how often the closure was called."""
    torch.manual_seed(seed)
    x, y, test_x, test_y = (tensor.double() if tensor.is_floating_point() else tensor for tensor in digits())
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).double()
    optimizer = triton_optim.LBFGS(model.parameters(), max_iter=50, line_search_fn="strong_wolfe")
    calls = 0

    def loss_of(logits, weight):
        return cross_entropy(logits, y) + weight.square().sum() / (2 * len(y))

    def closure():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = loss_of(model(x), model[1].weight)
        loss.backward()
        return loss

    for step in range(steps):
        loss = optimizer.step(closure)
        print(f"step {step + 1}: loss {loss.item():.8f} at its start, {calls} evaluations after it")

    reference = LogisticRegression(tol=1e-8, max_iter=2000).fit(x.flatten(1), y)
    with torch.no_grad():
        answer, bias = torch.from_numpy(reference.coef_), torch.from_numpy(reference.intercept_)
        exact = loss_of(x.flatten(1) @ answer.T + bias, answer).item()
        reached = loss_of(model(x), model[1].weight).item()
    expected, right = reference.score(test_x.flatten(1), test_y), accuracy(model, test_x, test_y)
    print(f"scikit-learn: loss {exact:.8f}, {expected:.1%} of the test digits; ours: {reached:.8f}, {right:.1%}")
    return exact, reached, expected, right, calls


if __name__ == "__main__":
    main()
