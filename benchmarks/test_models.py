"""How long is a step of AdamW on each of the named models, beside torch's fused one?"""

from collections.abc import Callable

import pytest
import torch

import triton_optim
from triton_optim.bench.comparison import Case, compare
from triton_optim.bench.models import NAMED, elements, shapes
from triton_optim.bench.room import SHARE, bytes_per_parameter, cut, free_bytes

ON_A_GPU = 1.0  # never slower than torch's fused step
PEERS = ("torch-fused",)


@pytest.mark.parametrize("model", [name for name in NAMED if name != "llama3_8b"])
def test_model(model: str, device: torch.device, benchmark: Callable, answer: Callable, patience: float) -> None:
    whole = shapes(model)
    each = bytes_per_parameter(triton_optim.AdamW, torch.float32, {}, 1, len(PEERS))
    kept = cut(whole, int(SHARE * free_bytes(device) / each))
    share = "" if kept == whole else f"cut down to {elements(kept) / elements(whole):.0%} of its parameters to fit"
    case = Case(triton_optim.AdamW, model, kept, device=device, cut=share)
    inner, target = (1, None) if device.type == "cpu" else (10, ON_A_GPU)
    found = compare(case, PEERS, patience=patience, rounds=5, inner=inner)
    assert not found.disagreeing, found.text
    ratios, words = found.beside()
    text = "; ".join(filter(None, [found.text, words, share]))
    m, figures = found.measurement, found.figures | ratios
    answer(case.name, text, figures, value=ratios["ratio"], target=target, measurement=m)
    benchmark.pedantic(found.contenders[0].step, rounds=3)
