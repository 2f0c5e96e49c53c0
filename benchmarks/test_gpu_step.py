"""What share of the GPU's copy bandwidth does a step reach, and how long do 1,000 small tensors take?"""

import gc
from collections.abc import Callable

import pytest
import torch
from harness import Side, assert_agree, measure
from models import MODELS, elements, parameters

import triton_optim

# Optimizer, its options, and torch's with its fastest implementations.
OPTIMIZERS = {
    "SGD": (triton_optim.SGD, {"lr": 1e-3}, torch.optim.SGD, ("fused", "foreach")),
    "SGD-momentum": (triton_optim.SGD, {"lr": 1e-3, "momentum": 0.9}, torch.optim.SGD, ("fused", "foreach")),
    # torch's foreach writes Nesterov's sum into the gradients, so that from step to step they grow.
    "SGD-nesterov": (triton_optim.SGD, {"lr": 1e-3, "momentum": 0.9, "nesterov": True}, torch.optim.SGD, ("fused",)),
    "Lion": (triton_optim.Lion, {"lr": 1e-4, "weight_decay": 0.1}, None, ()),
    "Adam": (triton_optim.Adam, {"lr": 1e-3, "weight_decay": 0.1}, torch.optim.Adam, ("fused", "foreach")),
    "AdamW": (triton_optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}, torch.optim.AdamW, ("fused", "foreach")),
    "AdamW-amsgrad": (triton_optim.AdamW, {"lr": 1e-3, "amsgrad": True}, torch.optim.AdamW, ("fused", "foreach")),
}

# A model, steps a run, and what to reach: time over that of the floor's bytes at copy speed, or milliseconds. Several
# steps a run let the host run ahead, as it does in training: what is slower, device or host, is what is timed.
BANDWIDTH = pytest.param("1e9", 5, 1 / 0.95, None, id="1e9")
SMALL = pytest.param("1000 x 1024", 20, None, 0.25, id="1000 x 1024")


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "inner", "target", "target_ms"), [BANDWIDTH, SMALL])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step(
    name: str,
    model: str,
    inner: int,
    target: float | None,
    target_ms: float | None,
    device: torch.device,
    benchmark: Callable,
    answer: Callable,
    patience: float,
) -> None:
    ours, options, torchs, implementations = OPTIMIZERS[name]
    count = elements(model)
    skip_without_memory(4 * count, ours, options, len(implementations), device)

    optimizers = {how: torchs(list(parameters(model, device)), **options, **{how: True}) for how in implementations}
    optimizers = {"ours": ours(list(parameters(model, device)), **options)} | optimizers
    assert_agree(optimizers, steps=3)
    (bucket,) = triton_optim.explain(optimizers["ours"])
    assert (bucket.backend, bucket.launches) == ("triton", 1)

    source = torch.randn(max(count, 1 << 28), device=device)
    target_of_copy = torch.empty_like(source)
    sides = [Side(how, optimizer.step) for how, optimizer in optimizers.items()]
    m = measure(
        [*sides, Side("copy", lambda: target_of_copy.copy_(source))], patience, device=device, inner=inner, rounds=5
    )

    copy_speed = 2 * source.nbytes / m.median("copy")
    floor = bucket.bytes_per_parameter * count / copy_speed
    ms = {how: 1e3 * m.median(how) for how in optimizers}
    figures = {f"{how} ms": value for how, value in ms.items()}
    figures |= {
        "copy TB/s": copy_speed / 1e12,
        "floor ms": 1e3 * floor,
        "bytes per parameter": bucket.bytes_per_parameter,
    }
    figures |= {f"{how} share of copy bandwidth": floor / m.median(how) for how in optimizers}
    text = ", ".join(f"{how} {ms[how]:.3f} ms" for how in optimizers)
    if target_ms is None:  # the small model stays in the cache
        text += f"; {floor / m.median('ours'):.1%} of copy bandwidth, which is {copy_speed / 1e12:.2f} TB/s"
    value = m.median("ours") / floor if target_ms is None else ms["ours"]
    case = f"{name}, {model} ({len(MODELS[model])} tensors)" + (", ms" if target_ms else ", time over the floor")
    answer(case, text, figures, value=value, target=target or target_ms, measurement=m)

    def step() -> None:
        optimizers["ours"].step()
        torch.accelerator.synchronize()

    benchmark.pedantic(step, rounds=10, warmup_rounds=1)


def skip_without_memory(role: int, ours: type, options: dict, peers: int, device: torch.device) -> None:
    """Skip unless all sides fit into memory, given the bytes of one role: p, g or a state."""
    tiny = ours([torch.nn.Parameter(torch.zeros(1, device=device))], **options)
    roles = len(triton_optim.explain(tiny)[0].dtypes)
    need = role * (roles * (1 + peers) + 3 + 2)  # foreach has up to three temporaries, the copy two buffers
    gc.collect()
    module = torch.get_device_module(device)
    module.empty_cache()
    free = module.mem_get_info()[0]
    if need > free:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free GPU memory; {free / 2**30:.0f} are")
