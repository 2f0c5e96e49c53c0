"""`triton-optim demo`: trains a small network with torch.optim.AdamW and with ours, and compares them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

import triton_optim

from ..bench.measure import Measurement, Side, measure
from ..race import digits
from ..race.task import Task
from ..race.training import Turn, threads
from ..util.devices import moved, usable_device
from ..util.extras import require
from ..util.files import write_json
from ..util.pictures import new_figure, open_frame, stacked_bars
from ..util.provenance import device_name, provenance
from ..util.table import readable_seconds
from .memory import UNIT, bars
from .options import check_files, command_line
from .terminal import new_table, open_console, progress_bar, say

if TYPE_CHECKING:
    from rich.console import Console

EXTRAS = ("rich", "sklearn", "matplotlib")
DEFAULT_EPOCHS = 20
NEEDED_ACCURACY = 0.97
ALLOWED_ACCURACY_DIFFERENCE = 0.01  # 4.5 of the 450 test images
PEAK_LR, WEIGHT_DECAY = 8e-3, 1e-2
ROUNDS, PATIENCE = 3, 2.0  # of 0.6 s; seconds
TORCH_COLOUR, OURS_COLOUR, NOISE_COLOUR = "#d95f02", "#1b6ca8", "#8a8a8a"

BuildOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

BUILD: dict[str, tuple[str, BuildOptimizer]] = {
    "torch": ("torch.optim.AdamW", torch.optim.AdamW),
    "ours": ("triton_optim.AdamW", triton_optim.AdamW),
    "torch_fused": ("torch.optim.AdamW(fused=True)", partial(torch.optim.AdamW, fused=True)),
    "torch_foreach": ("torch.optim.AdamW(foreach=True)", partial(torch.optim.AdamW, foreach=True)),
    "torch_for_loop": ("torch.optim.AdamW(foreach=False)", partial(torch.optim.AdamW, foreach=False)),
}
TRAINED = ("torch", "ours", "torch_fused")  # the third shows how far two of torch's own are apart: the noise to expect
TIMED = ("torch_for_loop", "torch_foreach", "torch_fused", "ours")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add, plot = parser.add_argument, Path("triton_optim_demo.png")
    add("--epochs", type=int, default=DEFAULT_EPOCHS, help="epochs of each training (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and batch order (default: %(default)s)")
    add("--device", help="where to train (default: the GPU if there is one, else the CPU)")
    add("--plot", type=Path, default=plot, metavar="FILE", help="for loss curves and memory (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write everything measured to FILE")


def run(args: argparse.Namespace) -> int:
    """Runs the demo; 0 if the two optimizers agree, 1 if they do not or if the demo cannot start."""
    try:
        require(EXTRAS, "triton-optim demo", "demo")
        if args.epochs < 1:
            raise ValueError(f"--epochs {args.epochs} trains nothing. Give 1 or more.")
        check_files(args.plot, args.json)
        device = usable_device("--device", args.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    settings = {"epochs": args.epochs, "seed": args.seed, "device": str(device), "batch": digits.BATCH}
    limits = {"needed_accuracy": NEEDED_ACCURACY, "allowed_accuracy_difference": ALLOWED_ACCURACY_DIFFERENCE}
    console = open_console()
    with threads(1):  # batches this small gain nothing from more
        record = {
            "command": command_line("demo", args),
            **provenance(device, ("scikit-learn",)),
            "settings": settings | limits,
            **compared(console, device, args),
        }
    failures = record["failures"] = failures_of(record)
    title = f"A small CNN on scikit-learn's digits: {args.epochs} epochs, seed {args.seed}, {device.type}"
    curves = {name: training["losses"] for name, training in record["trainings"].items()}
    network, _ = start("ours", args.seed, device)
    save_plot(args.plot, curves, bars(partial(triton_optim.AdamW, list(network.parameters()))), title)
    say(console, f"\nPlot of the loss curves and of memory: {args.plot}")
    if args.json is not None:
        write_json(args.json, record)
        say(console, f"Everything measured: {args.json}")
    for failure in failures:
        say(console, f"FAILED: {failure}", style="bold red")
    if not failures:
        say(console, "PASSED: the same accuracy, by the same path.", style="bold green")
    return 1 if failures else 0


def compared(console: Console, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Train, then time steps, and print what came of it."""
    learnt = len(digits.data()[0]) - digits.VALIDATION
    say(console, f"{learnt} handwritten digits to learn, {digits.VALIDATION} to test, on {device_name(device)}")
    steps = args.epochs * (learnt // digits.BATCH)
    trainings, optimizers = {}, {}
    with progress_bar(console) as progress:
        for name in TRAINED:
            task = progress.add_task(f"training with {BUILD[name][0]}", total=steps)
            model, optimizers[name] = start(name, args.seed, device)
            trainings[name] = train(model, optimizers[name], steps, args.seed, partial(progress.advance, task))
        task = progress.add_task("timing the steps", total=ROUNDS)
        times = step_times(device, args.seed, partial(progress.advance, task))
    ours = optimizers["ours"]
    assert isinstance(ours, triton_optim.RuleOptimizer)

    say(console, "\nTrainings from the same weights, on the same batches", style="bold")
    apart = {name: largest_difference(trainings[name].losses, trainings["torch"].losses) for name in TRAINED[1:]}
    table = new_table("optimizer", "accuracy", "last loss", "loss differs by", "first step", "total")
    for name, (accuracy, losses, total, first) in trainings.items():
        cells = (f"{accuracy:.2%}", f"{losses[-1]:.2e}", f"{apart[name]:.1e}" if name in apart else "-")
        table.add_row(BUILD[name][0], *cells, readable_seconds(first), readable_seconds(total))
    console.print(table)
    say(console, "Two of torch's own differ, as they do the same sums in another order.")

    say(console, "\nTime of optimizer.step() on this network", style="bold")
    median = {name: times.median(name) for name in TIMED}
    seconds = {name: times.samples(name) for name in TIMED}
    ratio = {name: median[name] / median["torch_fused"] for name in TIMED}
    table = new_table("optimizer", "median", "x torch fused")
    for name in TIMED:
        table.add_row(BUILD[name][0], readable_seconds(median[name]), f"{ratio[name]:.2f}")
    console.print(table)
    numels = [p.numel() for group in ours.param_groups for p in group["params"]]
    say(console, f"{len(numels)} tensors, {sum(numels):,} parameters; {times.quality()}")

    explanation = triton_optim.explain(ours)
    say(console, f"\nWhat was dispatched where: triton_optim.explain(optimizer)\n{explanation}")
    return {
        "trainings": {name: training._asdict() for name, training in trainings.items()},
        "largest_loss_difference_from_torch": apart,
        "step_times": {"tensors": len(numels), "elements": sum(numels), "seconds": seconds}
        | {"median_seconds": median, "ratio_to_torch_fused": ratio},
        "explain": {"backends": sorted({bucket.backend for bucket in explanation}), "text": str(explanation)},
    }


class Training(NamedTuple):
    """What one training left: accuracy on the test set, the loss of every batch, and times."""

    accuracy: float
    losses: list[float]
    seconds: float
    first_step_seconds: float  # of `optimizer.step()`, which is where a backend compiles


def start(name: str, seed: int, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network of 10 tensors and 96,426 parameters, equal for equal seeds, and its optimizer.

    No pooling and no dropout: its backward pass has no atomic additions, so on a GPU too nothing but the optimizers can
    make two trainings differ. Weights decay and biases do not, as in practice.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 32, 3, padding=1), nn.GELU()),
            *(nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.GELU()),
            *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GELU(), nn.Flatten()),
            *(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)),
        ).to(device)
    kinds = [[p for p in model.parameters() if (p.ndim > 1) is decays] for decays in (True, False)]
    groups = [{"params": kind, "weight_decay": decay} for kind, decay in zip(kinds, (WEIGHT_DECAY, 0.0), strict=True)]
    return model, BUILD[name][1](groups)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int, advance: Callable[[], None]
) -> Training:
    """Train on the batches that `seed` gives; `advance` is called after every step.

    The schedule changes lr and beta1 before every step: a backend that compiled them in would be slow.
    """
    x, y = digits.data()
    device = next(model.parameters()).device
    batches = digits.shuffled(x[digits.VALIDATION :], y[digits.VALIDATION :], seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK_LR, total_steps=steps)
    turn = Turn(model, optimizer, Task(model, batches, digits.loss, []), device)
    losses = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for _ in range(steps):
            losses.append(turn.step(batches))
            schedule.step()
            advance()
    with torch.no_grad():
        guesses = model(x[: digits.VALIDATION].to(device)).argmax(dim=1).cpu()
    accuracy = (guesses == y[: digits.VALIDATION]).double().mean().item()
    return Training(accuracy, losses, sum(turn.whole_seconds), turn.step_seconds[0])


def step_times(device: torch.device, seed: int, advance: Callable[[], None]) -> Measurement:
    """Time `optimizer.step()` alone; before each, the network computes new gradients, as in training."""
    batch = moved([part[: digits.BATCH] for part in digits.data()], device)
    sides = []
    for name in TIMED:
        model, optimizer = start(name, seed, device)

        def backward(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            digits.loss(model, batch).backward()  # type: ignore[no-untyped-call]

        sides.append(Side(name, optimizer.step, backward))
    return measure(sides, PATIENCE, device=device, rounds=ROUNDS, warm_up=5, advance=advance)


def largest_difference(curve: list[float], other: list[float]) -> float:
    """The largest difference of two loss curves; NaN if one of them has a NaN."""
    differences = torch.tensor(curve, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    return float(differences.abs().max())


def failures_of(record: dict[str, Any]) -> list[str]:
    """What is wrong with the measurements, one sentence each. NaN passes no comparison here."""
    accuracies = {name: record["trainings"][name]["accuracy"] for name in ("torch", "ours")}
    longer = max(DEFAULT_EPOCHS, 2 * record["settings"]["epochs"])
    failures = [
        f"{BUILD[name][0]} reads {accuracy:.2%} of the test digits; more than {NEEDED_ACCURACY:.0%} is needed. "
        f"Train longer: --epochs {longer}"
        for name, accuracy in accuracies.items()
        if not accuracy > NEEDED_ACCURACY
    ]
    apart, allowed = 100 * abs(accuracies["ours"] - accuracies["torch"]), 100 * ALLOWED_ACCURACY_DIFFERENCE
    if not apart <= allowed:
        failures.append(f"the accuracies differ by {apart:.2f} percentage points; {allowed:g} is allowed")
    return failures


def save_plot(path: Path, curves: dict[str, list[float]], memory: dict[str, dict[str, float]], title: str) -> None:
    """Draw the loss curves of "torch" and "ours", how far "ours" and "torch_fused" are from "torch", and what torch's
    optimizer and ours keep in memory.
    """
    figure = new_figure(8, 8.5, dpi=150)
    above, below, bottom = figure.subplots(3, 1, height_ratios=[3, 2, 2])
    below.sharex(above)
    stacked_bars(bottom, memory, UNIT)
    bottom.set_title("memory of this network with AdamW", fontsize="medium")
    steps = range(1, len(curves["torch"]) + 1)
    above.plot(steps, curves["torch"], color=TORCH_COLOUR, linewidth=3.5, alpha=0.55, label=BUILD["torch"][0])
    above.plot(steps, curves["ours"], color=OURS_COLOUR, linewidth=1.0, label=BUILD["ours"][0])
    above.set(yscale="log", ylabel="training loss of the batch", title=title)
    above.legend(frameon=False)
    noise = f"{BUILD['torch_fused'][0]}: rounding noise"
    for name, label, colour in (("torch_fused", noise, NOISE_COLOUR), ("ours", BUILD["ours"][0], OURS_COLOUR)):
        # Dots without lines: a difference of exactly 0 has no place on a log axis.
        apart = [abs(a - b) or float("nan") for a, b in zip(curves["torch"], curves[name], strict=True)]
        below.plot(steps, apart, ".", color=colour, markersize=4, label=label)
    below.set(yscale="log", ylabel="|loss - torch's loss|", xlabel="optimizer step")
    below.set_title("how far the losses are apart; no dot: equal to the last bit", fontsize="medium")
    below.legend(frameon=False, fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    for axes in (above, below):
        axes.grid(alpha=0.25)
    open_frame(above, below)
    figure.savefig(path)
