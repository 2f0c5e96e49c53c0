"""How long is the host busy with a Triton step, all until the driver launches, by number of tensors, plain and sharded?

With no GPU Triton's driver is a stub, and the parameters are on the CPU, as those of torch's fused step beside it.

New sharded gradients are made by far more Python than plain ones, which leaves its own data in the caches
and none of the step's. To see what sharding costs the step, and not what was done before it, plain and sharded steps
are also measured after the same work: others' sharded gradients are made before each.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import HAS_GPU
from host_profile import give_new_gradients
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import triton_optim
from triton_optim.bench.agreement import Contender, assert_agree
from triton_optim.bench.measure import Measurement, Side, measure
from triton_optim.bench.models import parameters, shapes
from triton_optim.util import gather

COUNTS = (10, 100, 1_000, 10_000)
CLAIMED = 1_000  # tensors that the targets are about
COMPARED = 100  # tensors whose real steps are compared first, where there is a GPU
TARGET_MS = 0.3
TARGET_RATIOS = {10: 0.45, 1_000: 0.06}  # of torch's fused step, by number of tensors
TARGET_SHARDED = 1.5  # times the plain figure
TARGET_WHOLE = 1.5  # likewise
PLAIN, SHARDED = "ours", "ours, sharded"
TORCH, TORCH_SHARDED = "torch-fused", "torch-fused, sharded"
# Passes that the step takes with it, and what a scaler would set.
WHOLE = {
    "clipped": {"max_grad_norm": 1.0},
    "amp": {"amp": "fused"},
    "amp, clipped": {"amp": "fused", "max_grad_norm": 1.0},
}


@pytest.fixture(scope="module")
def one_rank(device: torch.device) -> Iterator[DeviceMesh]:
    """A mesh of this process alone, as where a model is sharded over one GPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,))
    finally:
        dist.destroy_process_group()


def plain(count: int, device: torch.device) -> list[torch.nn.Parameter]:
    return list(parameters(shapes(f"{count}x1"), device))


def sharded(count: int, device: torch.device, mesh: DeviceMesh) -> list[torch.nn.Parameter]:
    params = []
    for p in plain(count, device):
        own = torch.nn.Parameter(DTensor.from_local(p.detach(), mesh, [Shard(0)], run_check=False))
        own.grad = DTensor.from_local(p.grad, mesh, [Shard(0)], run_check=False)
        params.append(own)
    return params


def contender(name: str, optimizer: torch.optim.Optimizer) -> Contender:
    """With what lies in this process of its parameters, in the same memory."""
    params = []
    for p in optimizer.param_groups[0]["params"]:
        own = p.detach().to_local() if isinstance(p, DTensor) else p.detach()
        own.grad = p.grad.to_local() if isinstance(p, DTensor) else p.grad
        params.append(own)
    return Contender(name, optimizer, params, optimizer.step)


def ours(name: str, params: list[torch.nn.Parameter], **options: Any) -> Contender:
    optimizer = triton_optim.AdamW(params, lr=0.1, weight_decay=0.1, backend="triton", **options)
    if "amp" in options:
        optimizer.grad_scale = torch.ones(1, device=params[0].device)
        if "max_grad_norm" not in options:
            optimizer.found_inf = torch.zeros(1, device=params[0].device)
    return contender(name, optimizer)


def torchs(name: str, params: list[torch.nn.Parameter]) -> Contender:
    return contender(name, torch.optim.AdamW(params, lr=0.1, weight_decay=0.1, fused=True))


def give_all(*sets: Sequence[torch.nn.Parameter]) -> None:
    for params in sets:
        give_new_gradients(params)


def prepared(contender: Contender, others: Sequence[torch.nn.Parameter] = ()) -> Side:
    """With new gradients before each step, and then for `others`."""
    return Side(
        contender.name, contender.step, partial(give_all, contender.optimizer.param_groups[0]["params"], others)
    )


@pytest.mark.parametrize("count", COUNTS)
def test_host_time(
    count: int,
    triton_device: torch.device,
    one_rank: DeviceMesh,
    benchmark: Callable,
    answer: Callable,
    patience: float,
) -> None:
    device = triton_device

    def sides(count: int) -> list[Contender]:
        own = [ours(PLAIN, plain(count, device)), ours(SHARDED, sharded(count, device, one_rank))]
        return [*own, torchs(TORCH, plain(count, device)), torchs(TORCH_SHARDED, sharded(count, device, one_rank))]

    if HAS_GPU:
        assert_agree(sides(min(count, COMPARED)))
    contenders = sides(count)
    passes = [ours(PLAIN, plain(count, device))]
    passes += [ours(name, plain(count, device), **options) for name, options in WHOLE.items()]
    gather.library.load()  # as a training that has gone on for a while
    # Wall time even on a GPU: what the device does meanwhile is not waited for.
    # Several steps in a row, so that their own data is in the caches; new sharded gradients take longer than these.
    turn = min(20, max(1, 5_000 // count))
    warm_up = 1 + gather.STEPS // turn
    m = measure([prepared(c) for c in contenders], patience, rounds=10, turn=turn, warm_up=warm_up)
    whole = measure([prepared(c) for c in passes], patience, rounds=10, turn=turn, warm_up=warm_up)
    others = sharded(count, device, one_rank)
    alike = measure([prepared(c, others) for c in contenders], patience, rounds=5, turn=turn, warm_up=1)
    benchmark.pedantic(contenders[0].step, setup=prepared(contenders[0]).prepare, rounds=100)
    report(answer, count, m, whole, alike)


def report(answer: Callable, count: int, m: Measurement, whole: Measurement, alike: Measurement) -> None:
    """The time, its share of torch's, and what sharding costs, with caches as the gradients leave them and alike."""
    claimed = count == CLAIMED
    ms = {name: 1e3 * m.median(name) for name in (PLAIN, TORCH, SHARDED, TORCH_SHARDED)}
    text = ", ".join(f"{name} {value:.3f} ms" for name, value in ms.items())
    case = f"AdamW, {count} tensors, new gradients"
    figures = {f"{name} ms": value for name, value in ms.items()}
    answer(f"{case}: ms", text, figures, value=ms[PLAIN], target=TARGET_MS if claimed else None, measurement=m)
    ratios, words = m.compared(PLAIN, [TORCH])
    answer(f"{case}: share of torch's", words, ratios, value=ratios["ratio"], target=TARGET_RATIOS.get(count))
    for name in WHOLE:
        ratios, words = whole.compared(name, [PLAIN])
        target = TARGET_WHOLE if count in TARGET_RATIOS else None
        answer(f"{case}, {name}", words, ratios, value=ratios["ratio"], target=target, measurement=whole)
    ratios, words = alike.compared(SHARDED, [PLAIN])
    text = f"after the same work {1e3 * alike.median(SHARDED):.3f} ms, {words}"
    text += f", torch's {alike.ratio(TORCH_SHARDED, TORCH):.2f} x; after each its own gradients "
    text += f"{m.ratio(SHARDED, PLAIN):.2f} x, torch's {m.ratio(TORCH_SHARDED, TORCH):.2f} x"
    figures = ratios | {"after its own gradients": m.ratio(SHARDED, PLAIN)}
    target = TARGET_SHARDED if claimed else None
    answer(f"{case}: one-rank DTensor", text, figures, value=ratios["ratio"], target=target, measurement=alike)
