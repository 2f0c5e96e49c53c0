"""How long are unscaling, clipping, AdamW and averaging in one step, beside torch's passes with its fused AdamW?"""

from collections.abc import Callable

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import triton_optim
from triton_optim.bench.measure import Side, measure
from triton_optim.bench.models import parameters, shapes

OPTIONS = {"lr": 0.01, "weight_decay": 0.01}
MAX_NORM, DECAY, SCALE = 1.0, 0.999, 1024.0
CASES = [("resnet50", False, 0.8), ("64M16", False, 0.6), ("resnet50", True, None), ("64M16", True, None)]


@pytest.mark.parametrize(("model", "scaled", "target"), CASES)
def test_whole_step(
    model: str,
    scaled: bool,
    target: float | None,
    device: torch.device,
    benchmark: Callable,
    answer: Callable,
    patience: float,
) -> None:
    theirs, own = (torch.nn.ParameterList(parameters(shapes(model), device)) for _ in range(2))
    optimizer = torch.optim.AdamW(theirs.parameters(), fused=True, **OPTIONS)
    average = AveragedModel(theirs, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    amp = {"amp": "fused"} if scaled else {}
    ours = triton_optim.AdamW(own.parameters(), max_grad_norm=MAX_NORM, ema_decay=DECAY, **amp, **OPTIONS)
    gradients = [SCALE * p.grad if scaled else p.grad.clone() for p in theirs]
    torchs_scaler = torch.amp.GradScaler(device.type, init_scale=SCALE, growth_interval=1 << 30, enabled=scaled)
    our_scaler = triton_optim.GradScaler(device.type, init_scale=SCALE, growth_interval=1 << 30, enabled=scaled)
    for scaler in (torchs_scaler, our_scaler):
        scaler.scale(torch.zeros((), device=device))  # a scaler starts with the first loss

    def new_gradients() -> None:
        """What was unscaled and clipped is written over, in both models alike."""
        for p, q, g in zip(theirs, own, gradients, strict=True):
            p.grad.copy_(g)
            q.grad.copy_(g)

    def passes() -> None:
        torchs_scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), MAX_NORM)
        torchs_scaler.step(optimizer)
        torchs_scaler.update()
        average.update_parameters(theirs)

    def one_step() -> None:
        our_scaler.step(ours)
        our_scaler.update()

    for _ in range(2):
        new_gradients()
        passes()
        one_step()
    with ours.averaged_parameters():
        for mean, p in zip(average.module, own, strict=True):
            torch.testing.assert_close(p, mean, rtol=1e-5, atol=1e-6)

    words = "unscale, clip, fused AdamW, average" if scaled else "clip, fused AdamW, average"
    sides = [Side("ours", one_step, new_gradients), Side(words, passes, new_gradients)]
    m = measure(sides, patience, device=device)
    ratios, text = m.compared("ours", [words])
    ms = 1e3 * m.median("ours")
    what = "Unscale, clip, AdamW and average" if scaled else "Clip, AdamW and average"
    case = f"{what}, {model} ({len(shapes(model))} tensors), {device.type}"
    answer(case, f"{ms:.1f} ms; {text}", ratios | {"ms": ms}, value=ratios["ratio"], target=target, measurement=m)
    benchmark.pedantic(one_step, rounds=3)
