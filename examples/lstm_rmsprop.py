"""An LSTM that reads handwritten digits from top to bottom, a row of pixels at a time, with RMSprop.

    python examples/lstm_rmsprop.py

A recurrent network's gradients can explode, so their norm is clipped before the step.
"""

import torch
from data import accuracy, batches, digits
from torch.nn.functional import cross_entropy

import triton_optim


class RowReader(torch.nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.lstm = torch.nn.LSTM(8, width, batch_first=True)
        self.head = torch.nn.Linear(width, 10)

    def forward(self, rows):
        read, _ = self.lstm(rows)
        return self.head(read[:, -1])


def main(seed=0, epochs=15):
    """The loss of the last epoch, and the share of the test digits that are read right."""
    torch.manual_seed(seed)
    x, y, test_x, test_y = digits()
    model = RowReader()
    optimizer = triton_optim.RMSprop(model.parameters(), lr=5e-3)
    for epoch in range(epochs):
        losses = []
        for rows, labels in batches(64, x, y):
            optimizer.zero_grad()
            loss = cross_entropy(model(rows), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        mean_loss = sum(losses) / len(losses)
        print(f"epoch {epoch + 1}: loss {mean_loss:.4f}")
    right = accuracy(model, test_x, test_y)
    print(f"{right:.1%} of {len(test_y)} test digits read right")
    return mean_loss, right


if __name__ == "__main__":
    main()
