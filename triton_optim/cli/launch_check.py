"""Whether a Triton launch works here: two steps of AdamW, compiled, loaded and launched, and compared with eager ones.

``python -m triton_optim.cli.launch_check WHERE`` prints a JSON object before each stage and one at the end. WHERE is
a GPU as torch names it, or a target of the stub driver, which launches nothing. `check_launch` runs it in a process of
its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

import triton_optim

from .. import dispatch
from ..backends.triton import stub_driver
from ..util.devices import accelerator

SHAPES = ((), (1,), (33, 5), (1023,), (1025,), (64, 64))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STUB_TARGETS = ("sm_90", "gfx942")
TIMEOUT_SECONDS = 120.0
# The stages, and what to do where one fails.
ADVICE = {
    "start": "See that `import torch, triton` works and that torch sees the GPU, or reinstall torch with its triton.",
    "compile": "Install the triton that this torch asks for (pip install --force-reinstall torch), and see that "
    "$TRITON_CACHE_DIR (~/.triton) can be written and has room.",
    "load": "The driver refused what was compiled: update the GPU's driver, or install a torch for this one.",
    "launch": "See that no other program holds the GPU or its memory, and run again with CUDA_LAUNCH_BLOCKING=1.",
    "result": 'Do not train with it: pass backend="eager" or backend="compiled", and report this output.',
}


def check_launch(where: str, timeout: float = TIMEOUT_SECONDS) -> dict[str, Any]:
    """Launch in a process of its own, where compiled kernels are not taken from the cache.

    Args:
        where: a GPU as torch names it, or a target of the stub driver.
        timeout: seconds.

    Returns:
        "where", "works", and "launches" and "seconds" if it does; "stage", "error" and "advice" if not.
    """
    command = [sys.executable, "-m", f"{__package__}.launch_check", where]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            command, env=env | {"TRITON_ALWAYS_COMPILE": "1"}, capture_output=True, timeout=timeout, check=False
        )
        out, error = done.stdout, ""
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip() or "no message"
            error = f"{said.splitlines()[-1]} (exit code {done.returncode})"
    except subprocess.TimeoutExpired as late:
        out, error = late.stdout or b"", f"stopped after {timeout:g} s: the machine is busy or a kernel hangs"
    # Compilers may print other lines.
    lines = (line for line in out.decode(errors="replace").splitlines() if line.startswith("{") and line.endswith("}"))
    printed = [json.loads(line) for line in lines]
    if error:
        stage = next((line["stage"] for line in reversed(printed) if "stage" in line), "start")
        return {"where": where, "works": False, "stage": stage, "error": error, "advice": ADVICE[stage]}
    return {"where": where, "works": True, **printed[-1]}


def say(**what: Any) -> None:
    """Print a line of JSON for the process that asked."""
    print(json.dumps(what), flush=True)


def parameters(device: str) -> list[Tensor]:
    """Standard normal, of each dtype and shape."""
    random = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=random, device="cpu").to(device, d) for d in DTYPES for s in SHAPES]
    return [value.requires_grad_() for value in values]


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Run a step of a small model."""
    random = torch.Generator().manual_seed(seed)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn(p.shape, generator=random, device="cpu").to(p.device, p.dtype)
    optimizer.step()


def check_results(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Raise ValueError where two steps of 0.5 differ by more than rounding explains.

    Each step both sides round a parameter once, by half an eps of it, and the update's states, by about an eps of the
    update. What was not updated is off by more in every dtype.
    """
    for p, q in zip(ours, theirs, strict=True):
        allowed = 2 * torch.finfo(p.dtype).eps * (1 + q.abs().max().item())
        found = (p.double() - q.double()).abs().max().item()
        if not found <= allowed:
            raise ValueError(
                f"{p.dtype} parameters of shape {tuple(p.shape)} are {found:.1e} from eager's; {allowed:.1e} is allowed"
            )


def main() -> int:
    """Run the stages, each said before it begins."""
    say(stage="start")
    start = time.perf_counter()
    where = sys.argv[1]
    from ..backends.triton.launch import Launcher

    launches: list[str] = []
    stub = where in stub_driver.TARGETS
    if stub:
        stub_driver.install(where, lambda launched: launches.append(launched.name))
    device = "cpu" if stub else where
    ours, theirs = parameters(device), parameters(device)
    optimizer = triton_optim.AdamW(ours, lr=0.5, backend="triton")
    load = Launcher.load

    def told(self: Launcher) -> None:
        say(stage="load")
        load(self)
        say(stage="launch")

    Launcher.load = told  # type: ignore[method-assign]
    say(stage="compile")
    optimizer.warmup()
    say(stage="launch")
    for seed in (1, 2):
        step(optimizer, seed)
    if stub:
        if len(launches) != 2 * len(DTYPES):
            raise RuntimeError(
                f"{len(launches)} launches in two steps; {2 * len(DTYPES)} are due, one a dtype and step"
            )
    else:
        torch.get_device_module(device).synchronize()
        say(stage="result")
        eager = triton_optim.AdamW(theirs, lr=0.5, backend="eager")
        for seed in (1, 2):
            step(eager, seed)
        check_results([p.detach() for p in ours], [p.detach() for p in theirs])
    say(launches=2 * len(DTYPES), seconds=time.perf_counter() - start)
    return 0


def places() -> list[str]:
    """Where to launch: on the GPU, or where there is none on stub drivers."""
    gpu = accelerator()
    return [gpu.type] if gpu is not None and gpu.type in dispatch.GPUS else list(STUB_TARGETS)


if __name__ == "__main__":
    sys.exit(main())
