"""Is a step on a CPU at the limit of memory: how long is one of the C++ backend beside the fastest of torch's paths,
and beside DeepSpeed's CPUAdam where that can be installed?
"""

import importlib
from collections.abc import Callable

import pytest
import torch
from harness import Side, assert_agree, measure
from models import MODELS, elements, parameters
from test_cpu_step import OPTIMIZERS, PATHS, paths

import triton_optim

BF16 = torch.bfloat16
# Ratios to torch's fused step, and to the fastest of its paths where it has none.
SMALL, MEDIUM, LARGE, NOT_FUSED = 0.12, 0.95, 1.0, 0.45
FUSED = ("AdamW", "SGD", "Adagrad")
CASES = [
    ("AdamW", "1000 x 1k", SMALL),
    *((name, model, target) for name in FUSED for model, target in (("ResNet-50", MEDIUM), ("64M in 16", LARGE))),
    *((name, "ResNet-50", NOT_FUSED) for name, (_, _, torchs) in OPTIMIZERS.items() if torchs is not None and
      "fused" not in paths(name, torchs)),
]  # fmt: skip


def in_dtype(model: str, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    params = []
    for p in parameters(model):
        own = torch.nn.Parameter(p.detach().to(dtype))
        own.grad = p.grad.to(dtype)
        params.append(own)
    return params


@pytest.mark.parametrize(("name", "model", "target"), CASES, ids=[f"{name}-{model}" for name, model, _ in CASES])
def test_step(name: str, model: str, target: float, benchmark: Callable, answer: Callable, patience: float) -> None:
    ours, options, torchs = OPTIMIZERS[name]
    own_paths = paths(name, torchs)
    peers = ["fused"] if "fused" in own_paths else own_paths
    optimizers = {"ours": ours(list(parameters(model)), backend="cpp", **options)}
    optimizers |= {path: torchs(list(parameters(model)), **options, **PATHS[path]) for path in peers}
    assert_agree(optimizers, steps=3)
    (bucket,) = triton_optim.explain(optimizers["ours"])

    m = measure([Side(side, optimizer.step) for side, optimizer in optimizers.items()], patience)
    ratios, words = m.compared("ours", peers)
    figures = ratios | {f"{side} ms": 1e3 * m.median(side) for side in optimizers}
    figures["ours GB/s"] = bucket.bytes_per_parameter * elements(model) / m.median("ours") / 1e9
    text = ", ".join(f"{side} {1e3 * m.median(side):.2f} ms" for side in optimizers)
    case = f"{name}, {model} ({len(MODELS[model])} tensors)"
    answer(case, f"{text}; {words}", figures, value=ratios["ratio"], target=target, measurement=m)
    benchmark.pedantic(optimizers["ours"].step, rounds=10)


def test_bfloat16(benchmark: Callable, answer: Callable, patience: float) -> None:
    model, options = "64M in 16", {"lr": 1e-3, "weight_decay": 0.1}
    ours = triton_optim.AdamW(in_dtype(model, BF16), backend="cpp", **options)
    fused = torch.optim.AdamW(in_dtype(model, BF16), fused=True, **options)
    assert_agree({"ours": ours, "fused": fused}, steps=3, share_of_update=0.1)
    m = measure([Side("ours", ours.step), Side("fused bf16", fused.step)], patience)
    ratios, words = m.compared("ours", ["fused bf16"])
    case = f"AdamW, {model} ({len(MODELS[model])} tensors), bfloat16"
    text = f"ours {1e3 * m.median('ours'):.2f} ms, fused {1e3 * m.median('fused bf16'):.2f} ms; {words}"
    answer(case, text, ratios, value=ratios["ratio"], target=0.5, measurement=m)
    benchmark.pedantic(ours.step, rounds=10)


def test_beside_deepspeed(benchmark: Callable, answer: Callable, patience: float) -> None:
    model, options = "64M in 16", {"lr": 1e-3, "weight_decay": 0.1}
    case = f"AdamW, {model} ({len(MODELS[model])} tensors), beside DeepSpeed's CPUAdam"
    ours = triton_optim.AdamW(list(parameters(model)), backend="cpp", **options)
    benchmark.pedantic(ours.step, rounds=1)
    try:
        peer = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam(list(parameters(model)), **options)
    except Exception as error:  # it is not installed, or builds nothing here
        answer(case, f"not measured: {type(error).__name__}: {error}", {})
        return
    m = measure([Side("ours", ours.step), Side("CPUAdam", peer.step)], patience)
    ratios, words = m.compared("ours", ["CPUAdam"])
    answer(case, words, ratios, value=ratios["ratio"], target=1.0, measurement=m)
