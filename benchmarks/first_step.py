"""What a process needs up to its first step, as JSON: ``python benchmarks/first_step.py MODEL DEVICE``.

`test_cold_start.py` runs it in fresh processes, with fresh compiler caches and with those of an earlier run.
"""

import json
import sys
import time

started = time.perf_counter()
import torch  # noqa: E402

torch_imported = time.perf_counter()
import triton_optim  # noqa: E402

imported = time.perf_counter()
from triton_optim.bench.models import parameters, shapes  # noqa: E402


def main(model: str, device: str) -> None:
    params, others = (list(parameters(shapes(model), device)) for _ in range(2))
    torchs = torch.optim.AdamW(others, weight_decay=0.1, fused=True)
    torchs.step()
    wait = torch.accelerator.synchronize if torch.device(device).type != "cpu" else lambda: None
    wait()

    start = time.perf_counter()
    optimizer = triton_optim.AdamW(params, weight_decay=0.1)
    optimizer.step()
    wait()
    first = time.perf_counter() - start

    torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-6)
    start = time.perf_counter()
    optimizer.step()
    wait()
    figures = {
        "backend": triton_optim.explain(optimizer)[0].backend,
        "import torch s": torch_imported - started,
        "import triton_optim s": imported - torch_imported,
        "first step s": first,
        "second step s": time.perf_counter() - start,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
