"""Task `charlm`: a small GPT learns the standard library's sources, character by character."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from .settings import SMALL
from .task import Task

CHARACTERS, CONTEXT, WIDTH, HEADS = 128, 32, 48, 4
BATCH = 16
READ = ("argparse", "doctest", "inspect", "tarfile", "typing")
UNREAD = "subprocess"
VALIDATION = 64  # windows


class Block(nn.Module):
    """Attention and a perceptron, each beside a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x` and the result: (batch, context, width)."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3 * HEADS, -1)).transpose(1, 2).chunk(3, dim=1)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(x)
        return out


class GPT(nn.Module):
    """Two blocks between characters and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block(), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, CHARACTERS)

    def forward(self, text: Tensor) -> Tensor:
        """Logits (batch, context, characters) of the character after each."""
        where = torch.arange(text.shape[1], device=text.device)
        out: Tensor = self.head(self.blocks(self.characters(text) + self.positions(where)))
        return out


def charlm(seed: int) -> Task:
    """A GPT of 2 blocks, 48 wide; windows of 32 characters, 16 in a batch; a module that it never reads judges."""
    read, unread = text_of(*READ), text_of(UNREAD)
    judged_at = torch.linspace(0, len(unread) - CONTEXT - 1, VALIDATION).long()
    return Task(
        *(GPT(), batches(read, seed), loss, [windows(unread, judged_at)]),
        steps=300,
        heads=["head"],
        threads=1,
        lrs=SMALL,
        sampled_loss=sampled_loss,
        samples=BATCH * CONTEXT,
    )


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross entropy of each character given those before it, in nats."""
    return cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def sampled_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """The same with characters that are drawn from what the model says of the text."""
    logits: Tensor = model(batch[:, :-1]).flatten(0, 1)
    drawn = torch.multinomial(logits.detach().softmax(1), 1).squeeze(1)
    return cross_entropy(logits, drawn)


@cache
def text_of(*modules: str) -> Tensor:
    """The sources of modules of the standard library, as numbers below 128."""
    specs = [importlib.util.find_spec(module) for module in modules]
    sources = [Path(spec.origin).read_text(encoding="utf-8") for spec in specs if spec and spec.origin]
    return torch.tensor(list("".join(sources).encode("ascii", "replace")))


def windows(text: Tensor, starts: Tensor) -> Tensor:
    """A window of text for each start, and the character after it: (starts, context + 1)."""
    return text[starts[:, None] + torch.arange(CONTEXT + 1)]


def batches(text: Tensor, seed: int) -> Iterator[Tensor]:
    """Random windows for ever, which the seed gives."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield windows(text, torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator))
