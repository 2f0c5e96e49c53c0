"""A small GPT that learns to write Python: AdamW, cosine schedule, mixed precision; clipping and averaging in the step.

    python examples/gpt_adamw.py

It reads modules of the standard library, and is judged by one that it has not read, beside a table of how often each
character follows each.
"""

import torch
from data import source_text
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import triton_optim

CHARACTERS, CONTEXT, WIDTH, HEADS = 128, 32, 48, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        qkv, up, down = (nn.Linear(m * WIDTH, n * WIDTH) for m, n in ((1, 3), (1, 4), (4, 1)))
        self.heads, self.out = nn.Sequential(nn.LayerNorm(WIDTH), qkv), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), up, nn.GELU(), down)

    def forward(self, x):
        q, k, v = self.heads(x).unflatten(2, (3 * HEADS, -1)).transpose(1, 2).chunk(3, dim=1)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.characters, self.positions = nn.Embedding(CHARACTERS, WIDTH), nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.layers = nn.Sequential(Block(), Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS))

    def forward(self, text):
        return self.layers(self.characters(text) + self.positions)


def loss_of(model, text, starts):
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(windows[:, :-1])
    return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def loss_of_table(read, unread):
    pairs = torch.bincount(CHARACTERS * read[:-1] + read[1:], minlength=CHARACTERS**2).view(CHARACTERS, -1) + 0.1
    return -(pairs / pairs.sum(1, keepdim=True)).log()[unread[:-1], unread[1:]].mean().item()


def main(seed=0, steps=120):
    """The loss on unread text: the table's; then the GPT's, before it is trained and after."""
    torch.manual_seed(seed)
    read, unread = source_text("argparse", "doctest", "inspect", "tarfile", "typing"), source_text("subprocess")
    judged_at = torch.arange(0, len(unread) - CONTEXT, 4 * CONTEXT)
    model = GPT()
    optimizer = triton_optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, amp="fused", max_grad_norm=1.0, ema_decay=0.9
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    scaler = triton_optim.GradScaler("cpu")
    before = loss_of(model, unread, judged_at).item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, read, torch.randint(len(read) - CONTEXT, (16,)))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    with optimizer.averaged_parameters(), torch.no_grad():
        table, after = loss_of_table(read, unread), loss_of(model, unread, judged_at).item()
    print(f"loss on unread text: table {table:.3f}, GPT before training {before:.3f}, after {after:.3f}")
    return table, before, after


if __name__ == "__main__":
    main()
