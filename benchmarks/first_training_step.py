"""What the first training step of a small network takes, as JSON: ``python benchmarks/first_training_step.py AdamW``.

`test_cold_start.py` runs it in fresh processes.
"""

import json
import sys
import time

import torch
from torch import nn

import triton_optim

OPTIONS = {"SGD": {"lr": 0.01, "momentum": 0.9}}


def network() -> nn.Module:
    """The demo's."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.GELU()),
        *(nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.GELU()),
        *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GELU(), nn.Flatten()),
        *(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)),
    )


def main(name: str) -> None:
    # What a process does once, whatever the optimizer, is no part of it.
    other = network()
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    nn.functional.cross_entropy(other(images), labels).backward()
    torch.optim.SGD(other.parameters(), lr=0.01).step()
    model = network()
    start = time.perf_counter()
    optimizer = getattr(triton_optim, name)(model.parameters(), **OPTIONS.get(name, {}))
    made = time.perf_counter()
    if sys.argv[2:] == ["trained"]:
        nn.functional.cross_entropy(model(images), labels).backward()
    else:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    stepping = time.perf_counter()
    optimizer.step()
    end = time.perf_counter()
    assert [bucket.backend for bucket in triton_optim.explain(optimizer)] == ["cpp"]
    figures = {"made s": made - start, "first step s": end - stepping, "both s": made - start + end - stepping}
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1])
