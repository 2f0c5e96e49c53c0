"""One training of `triton-optim demo` in a fresh process, as JSON: ``python benchmarks/demo_training.py OPTIMIZER``.

`test_demo_training.py` runs it. The optimizers are those of the demo: ours, torch, torch_fused.
"""

import json
import sys
import time

import torch
from torch._dynamo import disable  # noqa: F401  the first optimizer of a process imports it, whosever it is

from triton_optim.cli import demo
from triton_optim.race import digits
from triton_optim.race.training import threads

STEPS = demo.DEFAULT_EPOCHS * ((len(digits.data()[0]) - digits.VALIDATION) // digits.BATCH)


def main(name: str) -> None:
    device = torch.device("cpu")
    with threads(1):
        # What a process does once, whatever the optimizer, is no part of it: another network learns first.
        other, _ = demo.start("torch", 1, device)
        digits.loss(other, tuple(part[: digits.BATCH] for part in digits.data())).backward()
        start = time.perf_counter()
        model, optimizer = demo.start(name, 0, device)
        made = time.perf_counter() - start
        training = demo.train(model, optimizer, STEPS, 0, lambda: None)
    print(json.dumps({"training": made + training.seconds, "first step": training.first_step_seconds, "made": made}))


if __name__ == "__main__":
    main(*sys.argv[1:])
