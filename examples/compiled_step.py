"""A compiled step under a schedule: one graph, compiled once, while the learning rate changes in every step.

python examples/compiled_step.py
"""

import torch

import triton_optim as optim


def train(steps=20):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    decay, rest = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() < 2]
    optimizer = optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    step = torch.compile(optimizer.step, fullgraph=True)
    x = torch.randn(128, 16)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), x[:, :1].sin())
        loss.backward()
        step()
        schedule.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = train()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"graphs compiled: {torch._dynamo.utils.counters['stats']['unique_graphs']}")
