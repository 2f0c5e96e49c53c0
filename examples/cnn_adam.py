"""A small convolutional network on handwritten digits, with Adam.

    python examples/cnn_adam.py

With torch.optim it would be the same script, but for one word. At the end it tells how the update was run.
"""

import torch
from data import accuracy, batches, digits
from torch.nn import Conv2d, Flatten, Linear, MaxPool2d, ReLU
from torch.nn.functional import cross_entropy

import triton_optim


def main(seed=0, epochs=8):
    """The loss of the last epoch, and the share of the test digits that are read right."""
    torch.manual_seed(seed)
    x, y, test_x, test_y = digits()
    model = torch.nn.Sequential(
        *(Conv2d(1, 16, 3, padding=1), ReLU(), MaxPool2d(2)),
        *(Conv2d(16, 32, 3, padding=1), ReLU(), MaxPool2d(2)),
        *(Flatten(), Linear(128, 10)),
    )
    optimizer = triton_optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(epochs):
        losses = []
        for images, labels in batches(64, x[:, None], y):
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        mean_loss = sum(losses) / len(losses)
        print(f"epoch {epoch + 1}: loss {mean_loss:.4f}")
    right = accuracy(model, test_x[:, None], test_y)
    print(f"{right:.1%} of {len(test_y)} test digits read right")
    print(triton_optim.explain(optimizer))
    return mean_loss, right


if __name__ == "__main__":
    main()
