"""How long is a step of the optimizers that see a matrix as a whole, beside torch's?"""

from collections.abc import Callable

import pytest
import torch
from harness import Measurement, Side, assert_agree, measure
from models import MODELS, parameters

import triton_optim


def test_muon(device: torch.device, benchmark: Callable, answer: Callable, patience: float) -> None:
    """All of GPT-2 small, though its layers are alike: matrices of one shape may be taken together."""
    model = "GPT-2 small"
    options = {"lr": 1e-2, "weight_decay": 0.0}  # without decay the change is the orthogonal matrix alone
    ours = triton_optim.Muon(list(parameters(model, device)), **options)
    optimizers = {"ours": ours, "torch": torch.optim.Muon(list(parameters(model, device)), **options)}
    # torch iterates in bfloat16: of random matrices its result is 1.1 % off that in float32.
    assert_agree(optimizers, steps=1, share_of_update=2e-2)

    # On a CPU without bfloat16 instructions a step of torch's takes half a minute. The comparison was the warm-up.
    m = measure(sides(optimizers), patience, device=device, rounds=3, warm_up=0)
    figures, text = beside(optimizers, m)
    case = f"Muon, {model} ({len(MODELS[model])} tensors)"
    answer(case, text, figures, value=figures["ratio"], target=1.0, measurement=m)
    benchmark.pedantic(ours.step, rounds=1)


@pytest.mark.parametrize("model", ["ResNet-50", "GPT-2 small"])
def test_adafactor(model: str, device: torch.device, benchmark: Callable, answer: Callable, patience: float) -> None:
    ours = triton_optim.Adafactor(list(parameters(model, device)), lr=1e-2)
    optimizers = {"ours": ours}
    for path, foreach in {"foreach": True, "for-loop": False}.items():
        optimizers[path] = torch.optim.Adafactor(list(parameters(model, device)), lr=1e-2, foreach=foreach)
    assert_agree(optimizers, steps=3)

    m = measure(sides(optimizers), patience, device=device, rounds=5)
    figures, text = beside(optimizers, m)
    answer(f"Adafactor, {model} ({len(MODELS[model])} tensors)", text, figures, measurement=m)
    benchmark.pedantic(ours.step, rounds=3)


def sides(optimizers: dict[str, torch.optim.Optimizer]) -> list[Side]:
    return [Side(name, optimizer.step) for name, optimizer in optimizers.items()]


def beside(optimizers: dict[str, torch.optim.Optimizer], m: Measurement) -> tuple[dict, str]:
    """Figures and words: everyone's time, and ours beside the fastest of the others."""
    ms = {name: 1e3 * m.median(name) for name in optimizers}
    compared, words = m.compared("ours", [name for name in optimizers if name != "ours"])
    text = ", ".join(f"{name} {value:.2f} ms" for name, value in ms.items())
    return {f"{name} ms": value for name, value in ms.items()} | compared, f"{text}; {words}"
