"""Parameter groups: another learning rate, and no weight decay, for biases and norms.

    python examples/parameter_groups.py

Weight decay pulls values towards 0. That is meant for matrices; here is what it does to the scale of a norm, which
starts at 1. On a GPU all groups share one kernel launch, whatever their learning rates.
"""

import torch
from data import accuracy, batches, digits
from torch.nn import Flatten, LayerNorm, Linear, ReLU, Sequential
from torch.nn.functional import cross_entropy

import triton_optim


def train(decay_of_vectors, epochs=10):
    x, y, test_x, test_y = digits()
    norm = LayerNorm(64)
    model = Sequential(Flatten(), Linear(64, 64), norm, ReLU(), Linear(64, 10))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # the biases, and both parameters of the norm
    groups = [{"params": matrices}, {"params": vectors, "lr": 1e-2, "weight_decay": decay_of_vectors}]
    optimizer = triton_optim.AdamW(groups, lr=5e-3, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)  # of both learning rates
    for _ in range(epochs):
        for images, labels in batches(64, x, y):
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
        schedule.step()
    return accuracy(model, test_x, test_y), norm.weight.mean().item(), optimizer


def main(seed=0):
    """Without and with decay of the vectors: accuracy on test digits, mean scale of the norm, and the optimizer."""
    reached = []
    for decay in (0.0, 0.5):
        torch.manual_seed(seed)
        right, scale, optimizer = train(decay)
        print(f"decay of biases and norms {decay}: {right:.1%} of the test digits, mean scale {scale:.3f}")
        reached.append((right, scale, optimizer))
    print(triton_optim.explain(optimizer))
    return reached


if __name__ == "__main__":
    main()
