"""How long are clipping, AdamW and averaging in one step, beside torch's three passes with its fused AdamW?"""

from collections.abc import Callable

import pytest
import torch
from harness import Side, measure
from models import MODELS, parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import triton_optim

OPTIONS = {"lr": 0.01, "weight_decay": 0.01}
MAX_NORM, DECAY = 1.0, 0.999


@pytest.mark.parametrize(("model", "target"), [("ResNet-50", 0.8), ("64M in 16", 0.6)])
def test_whole_step(model: str, target: float, benchmark: Callable, answer: Callable, patience: float) -> None:
    theirs, own = (torch.nn.ParameterList(parameters(model)) for _ in range(2))
    device = theirs[0].device.type
    optimizer = torch.optim.AdamW(theirs.parameters(), fused=True, **OPTIONS)
    average = AveragedModel(theirs, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    ours = triton_optim.AdamW(own.parameters(), max_grad_norm=MAX_NORM, ema_decay=DECAY, **OPTIONS)
    gradients = [p.grad.clone() for p in theirs]

    def passes() -> None:
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), MAX_NORM)
        optimizer.step()
        average.update_parameters(theirs)

    passes()
    ours.step()
    for p, g in zip(theirs, gradients, strict=True):
        p.grad = g  # which they have clipped
    passes()
    ours.step()
    with ours.averaged_parameters():
        for mean, p in zip(average.module, own, strict=True):
            torch.testing.assert_close(p, mean, rtol=1e-5, atol=1e-6)

    m = measure([Side("ours", ours.step), Side("clip, fused AdamW, average", passes)], patience)
    ratios, words = m.compared("ours", ["clip, fused AdamW, average"])
    ms = 1e3 * m.median("ours")
    case = f"Clip, AdamW and average, {model} ({len(MODELS[model])} tensors), {device}"
    answer(case, f"{ms:.1f} ms; {words}", ratios | {"ms": ms}, value=ratios["ratio"], target=target, measurement=m)
    benchmark.pedantic(ours.step, rounds=3)
