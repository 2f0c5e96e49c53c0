"""What is compiled for the first step of the Triton backend, and how long it takes, as JSON:

    python benchmarks/first_launch.py "AdamW fp32" step

`test_triton_cold_start.py` runs it in fresh processes with empty caches. With no GPU the stub driver takes its place.
The checkout it imports need not be the one that it lies in.
"""

import json
import sys
import time

import torch
from triton import knobs

import triton_optim
from triton_optim.backends.triton import stub_driver

CASES = {
    "AdamW fp32": (torch.float32, {}),
    "AdamW bf16, int8 states": (torch.bfloat16, {"state_dtype": "int8", "param_precision": "stochastic"}),
    "AdamW fp32, clipped": (torch.float32, {"max_grad_norm": 1.0}),
    "AdamW fp32, amp": (torch.float32, {"amp": "fused", "max_grad_norm": 1.0}),
}
# A first forward and backward pass lies between the making of an optimizer and its first step; here, a second.
CALLS = ("step", "step a second later", "warmup")


def main(case: str, call: str) -> None:
    """One first step, or warmup, of four aligned tensors."""
    if torch.accelerator.is_available():
        device, wait = torch.accelerator.current_accelerator(), torch.accelerator.synchronize
    else:
        stub_driver.install("sm_90")
        device, wait = torch.device("cpu"), lambda: None
    dtype, options = CASES[case]
    params = [torch.randn(8192).to(device, dtype).requires_grad_() for _ in range(4)]
    for p in params:
        p.grad = torch.randn_like(p)
    torch.optim.SGD(params)  # the first optimizer of a process imports torch's compiler, whoever's it is
    wait()
    kernels = []

    def compiled(*, src: object, times: object, cache_hit: bool, **_: object) -> None:
        assert not cache_hit, "the caches are not empty"
        stages = {stage: microseconds / 1e6 for stage, microseconds in times.lowering_stages}
        kernels.append({"kernel": src.name, "source": times.ir_initialization / 1e6, **stages})

    knobs.compilation.listener = compiled
    start = time.perf_counter()
    optimizer = triton_optim.AdamW(params, backend="triton", **options)
    if "amp" in options:
        optimizer.grad_scale, optimizer.found_inf = torch.ones(1, device=device), torch.zeros(1, device=device)
    made = time.perf_counter() - start
    time.sleep(1.0 if call == "step a second later" else 0.0)
    start = time.perf_counter()
    (optimizer.warmup if call == "warmup" else optimizer.step)()
    wait()
    print(
        json.dumps({"seconds": made + time.perf_counter() - start, "from": triton_optim.__file__, "kernels": kernels})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
