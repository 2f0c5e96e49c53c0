"""What share of the GPU's copy bandwidth does a step reach, and how long do 1,000 small tensors take?"""

import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ELEMENTWISE, HAS_GPU

import triton_optim
from triton_optim.bench.agreement import Contender, differences
from triton_optim.bench.comparison import Case, entrants
from triton_optim.bench.measure import Side, measure
from triton_optim.bench.models import elements, shapes
from triton_optim.bench.room import SHARE, bytes_per_parameter, free_bytes

NESTEROV = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
FUSED, PATHS = ("torch-fused",), ("torch-fused", "torch-foreach")
# The optimizer, its settings and torch's paths, by label.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any] | None, tuple[str, ...]]] = {
    **{name: (name, None, PATHS) for name in ELEMENTWISE},
    "SGD without momentum": ("SGD", {"lr": 0.1}, PATHS),
    # torch's foreach writes Nesterov's sum into the gradients, so that from step to step they grow.
    "SGD nesterov": ("SGD", NESTEROV, FUSED),
    "AdamW amsgrad": ("AdamW", {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}, PATHS),
}
BF16 = torch.bfloat16
CODECS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bf16 storage": (BF16, {}),
    "bf16 stochastic, bf16 states": (BF16, {"param_precision": "stochastic", "state_dtype": BF16}),
    "bf16 kahan": (BF16, {"param_precision": "kahan"}),
    "bf16 split24": (BF16, {"param_precision": "split24"}),
    "bf16 split32": (BF16, {"param_precision": "split32"}),
    "bf16 master": (BF16, {"param_precision": "master"}),
    "fp32, int8 states": (torch.float32, {"state_dtype": "int8"}),
    "bf16 stochastic, int8 states": (BF16, {"param_precision": "stochastic", "state_dtype": "int8"}),
    "bf16 stochastic, int4 states": (BF16, {"param_precision": "stochastic", "state_dtype": "int4"}),
}
COPIED = 1 << (28 if HAS_GPU else 10)  # elements: more than any cache holds
LARGE, SMALL = "100x10M", "1000x1024"
# Time over that of the bytes of the floor at copy speed.
TARGET, TARGET_OF_CODECS = 1 / 0.95, 1 / 0.90
TARGET_OF_SMALL_MS = 0.25


@pytest.mark.gpu
@pytest.mark.parametrize("label", OPTIMIZERS)
def test_share_of_bandwidth(label: str, device: torch.device, answer: Callable, patience: float) -> None:
    name, settings, peers = OPTIMIZERS[label]
    case = Case(getattr(triton_optim, name), LARGE, shapes(LARGE), device=device, settings=settings, label=label)
    figures, text, m = step_figures(case, peers, patience, inner=5)
    value = 1 / figures["ours share of copy bandwidth"]
    answer(f"{case.name}, time over the floor", text, figures, value=value, target=TARGET, measurement=m)


@pytest.mark.gpu
@pytest.mark.parametrize("codec", CODECS)
def test_codecs_share_of_bandwidth(codec: str, device: torch.device, answer: Callable, patience: float) -> None:
    dtype, options = CODECS[codec]
    case = Case(triton_optim.AdamW, LARGE, shapes(LARGE), dtype, device, options)
    figures, text, m = step_figures(case, FUSED, patience, inner=5)
    value = 1 / figures["ours share of copy bandwidth"]
    answer(f"{case.name}, time over the floor", text, figures, value=value, target=TARGET_OF_CODECS, measurement=m)


@pytest.mark.gpu
@pytest.mark.parametrize("label", OPTIMIZERS)
def test_small_tensors(label: str, device: torch.device, answer: Callable, patience: float) -> None:
    name, settings, peers = OPTIMIZERS[label]
    case = Case(getattr(triton_optim, name), SMALL, shapes(SMALL), device=device, settings=settings, label=label)
    figures, text, m = step_figures(case, peers, patience, inner=20)
    value = figures["ours ms"]
    answer(f"{case.name}, ms", text, figures, value=value, target=TARGET_OF_SMALL_MS, measurement=m)


def step_figures(case: Case, peers: tuple[str, ...], patience: float, inner: int) -> tuple[dict, str, Any]:
    """Device and wall time, kernels and share of the copy bandwidth of every side.

    Several steps a run let the host run ahead, as it does in training: what is slower, device or host, is timed.
    """
    skip_without_memory(case, len(peers))
    contenders, reasons = entrants(case, peers, ("triton",))
    found = differences(contenders)
    reasons |= {name: d.reason() for name, d in found.items() if not d.same}
    contenders = [c for c in contenders if c.name not in reasons]
    assert contenders, reasons
    (bucket,) = triton_optim.explain(contenders[0].optimizer)
    assert bucket.launches == 1

    count = elements(case.shapes)
    source = torch.randn(max(count, COPIED), device=case.device)
    copied = torch.empty_like(source)
    sides = [*(Side(c.name, c.step) for c in contenders), Side("copy", lambda: copied.copy_(source))]
    m = measure(sides, patience, device=case.device, inner=inner, rounds=5)

    copy_speed = 2 * source.nbytes / m.median("copy")
    floor = bucket.bytes_per_parameter * count / copy_speed
    figures: dict[str, Any] = {
        "copy TB/s": copy_speed / 1e12,
        "floor ms": 1e3 * floor,
        "bytes a parameter": bucket.bytes_per_parameter,
        "absent": reasons,
    }
    words = []
    for c in contenders:
        ms, kernels, alone = 1e3 * m.median(c.name), launched(c), 1e3 * wall_seconds(c)
        share = floor / m.median(c.name)
        figures |= {f"{c.name} ms": ms, f"{c.name} kernels": kernels, f"{c.name} wall ms, alone": alone}
        figures[f"{c.name} share of copy bandwidth"] = share
        words.append(f"{c.name} {ms:.3f} ms ({kernels} kernels, {alone:.3f} ms until the device is done)")
    # A small model stays in the cache: its share of the bandwidth says nothing.
    share = f"; {figures['ours share of copy bandwidth']:.1%} of copy bandwidth, {copy_speed / 1e12:.2f} TB/s"
    absent = "".join(f"; {name}: {reason}" for name, reason in reasons.items())
    return figures, ", ".join(words) + (share if case.model == LARGE else "") + absent, m


def launched(contender: Contender) -> int:
    """Kernels that a step starts on the device."""
    torch.accelerator.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        contender.step()
        torch.accelerator.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in events)


def wall_seconds(contender: Contender, steps: int = 20) -> float:
    """The median time from the call of a step until the device has finished it, nothing else running."""
    times = []
    for _ in range(steps):
        torch.accelerator.synchronize()
        start = time.perf_counter()
        contender.step()
        torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[steps // 2]


def skip_without_memory(case: Case, peers: int) -> None:
    """Skip unless all sides fit into memory, and what is copied."""
    gc.collect()
    torch.accelerator.empty_cache()
    each = bytes_per_parameter(case.optimizer, case.dtype, dict(case.options), 1, peers) + 8
    need, free = each * elements(case.shapes), SHARE * free_bytes(case.device)
    if need > free:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of GPU memory; {free / 2**30:.0f} may be used")
