"""The measurements of `triton-optim demo`: the digits, the network, a training, the time of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import triton_optim

BATCH = 64
TRAINING_SAMPLES = 1347  # of 1797, three quarters
PEAK_LR = 8e-3
WEIGHT_DECAY = 1e-2

BuildOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

# The third shows how far two of torch's own implementations are apart, which is the noise to expect.
TRAININGS: dict[str, tuple[str, BuildOptimizer]] = {
    "torch": ("torch.optim.AdamW", lambda groups: torch.optim.AdamW(groups)),
    "ours": ("triton_optim.AdamW", lambda groups: triton_optim.AdamW(groups)),
    "torch_fused": ("torch.optim.AdamW(fused=True)", lambda groups: torch.optim.AdamW(groups, fused=True)),
}
TIMED: dict[str, tuple[str, BuildOptimizer]] = {
    "torch_for_loop": ("torch for-loop", lambda groups: torch.optim.AdamW(groups, foreach=False)),
    "torch_foreach": ("torch foreach", lambda groups: torch.optim.AdamW(groups, foreach=True)),
    "torch_fused": ("torch fused", lambda groups: torch.optim.AdamW(groups, fused=True)),
    "ours": ("triton_optim", lambda groups: triton_optim.AdamW(groups)),
}


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits: images (n, 1, 8, 8) float32 in [0, 1], labels (n,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Training:
    """What one training left: the loss of every batch, the accuracy on the test set, and times in seconds.

    `first_step_seconds` is the first `optimizer.step()`, which is where a backend compiles.
    """

    losses: list[float]
    accuracy: float
    seconds: float
    first_step_seconds: float
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class StepTimes:
    """Seconds of each timed `optimizer.step()` of each implementation, in the order they were measured."""

    seconds: dict[str, list[float]]
    tensors: int
    elements: int


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch to one CPU thread: batches this small gain nothing from more.

    With more, threads that wait for one another spin; beside other programs on two cores, a training that
    takes 8 s on one thread took 80 s on two.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_digits(device: torch.device) -> Digits:
    """Loads the 1797 digits with a split that is the same in every run, whatever the seed."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAINING_SAMPLES], order[TRAINING_SAMPLES:]
    return Digits(images[train].to(device), labels[train].to(device), images[test].to(device), labels[test].to(device))


def small_cnn(seed: int, device: torch.device) -> nn.Sequential:
    """Builds the network of 10 tensors and 96,426 parameters; equal seeds give equal weights on any device.

    No pooling and no dropout: its backward pass has no atomic additions, so on a GPU too nothing but the
    optimizers can make two trainings differ.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(256, 256),
            nn.GELU(),
            nn.Linear(256, 10),
        )
    return model.to(device)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights decay and biases do not, as in practice; it also makes every optimizer run two groups."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": biases, "weight_decay": 0.0}]


def steps_per_epoch(digits: Digits) -> int:
    """How many batches an epoch has."""
    return len(digits.train_labels) // BATCH


def batches(digits: Digits, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields shuffled full batches for ever; equal seeds give equal batches."""
    generator = torch.Generator().manual_seed(seed)
    samples = steps_per_epoch(digits) * BATCH
    while True:
        order = torch.randperm(len(digits.train_labels), generator=generator)[:samples]
        for chosen in order.to(digits.train_labels.device).view(-1, BATCH):
            yield digits.train_images[chosen], digits.train_labels[chosen]


def train(build: BuildOptimizer, digits: Digits, epochs: int, seed: int, advance: Callable[[], None]) -> Training:
    """Trains the network that `seed` gives, on the batches that `seed` gives, with a one-cycle schedule.

    The schedule changes lr and beta1 before every step, so a backend that compiled them in would be found
    out by its time. `advance` is called after every step.
    """
    device = digits.train_images.device
    model = small_cnn(seed, device)
    optimizer = build(parameter_groups(model))
    steps = epochs * steps_per_epoch(digits)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK_LR, total_steps=steps)
    first_step_seconds = 0.0
    losses: list[Tensor] = []  # read at the end: .item() would stop a GPU at every step
    start = time.perf_counter()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for step, (images, labels) in zip(range(steps), batches(digits, seed), strict=False):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            if step == 0:
                first_step_seconds = timed_step(optimizer, device)
            else:
                optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            advance()
        curve: list[float] = torch.stack(losses).tolist()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        right = (model(digits.test_images).argmax(dim=1) == digits.test_labels).sum().item()
    return Training(curve, right / len(digits.test_labels), seconds, first_step_seconds, optimizer)


def timed_step(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """Returns the seconds from the call of `optimizer.step()` until the device has finished it."""
    wait_for(device)
    start = time.perf_counter()
    optimizer.step()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def step_times(digits: Digits, seed: int, rounds: int, warmup: int, advance: Callable[[], None]) -> StepTimes:
    """Times `optimizer.step()` alone, on the gradients that the network has just computed.

    Each of TIMED has a copy of the network and takes a turn in every round, in an order that rotates, so a
    slow moment of the machine falls on all of them. Gradients are new tensors before each step, as in
    training: a backend that keeps their addresses must look them up again.
    """
    device = digits.train_images.device
    models = {name: small_cnn(seed, device) for name in TIMED}
    optimizers = {name: build(parameter_groups(models[name])) for name, (_, build) in TIMED.items()}
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    names = list(TIMED)
    for turn, (images, labels) in zip(range(warmup + rounds), batches(digits, seed), strict=False):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            optimizers[name].zero_grad()
            nn.functional.cross_entropy(models[name](images), labels).backward()  # type: ignore[no-untyped-call]
            taken = timed_step(optimizers[name], device)
            if turn >= warmup:
                seconds[name].append(taken)
        advance()
    parameters = list(models["ours"].parameters())
    return StepTimes(seconds, len(parameters), sum(p.numel() for p in parameters))


def ratios_to_fused(times: StepTimes) -> dict[str, float]:
    """The median time of each implementation over that of torch's fused one."""
    fused = statistics.median(times.seconds["torch_fused"])
    return {name: statistics.median(taken) / fused for name, taken in times.seconds.items()}


def largest_difference(curve: list[float], other: list[float]) -> float:
    """The largest difference of two loss curves; NaN if one of them has a NaN."""
    differences = torch.tensor(curve, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    return float(differences.abs().max())
