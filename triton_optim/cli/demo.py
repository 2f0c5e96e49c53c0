"""`triton-optim demo`: trains a small network with torch.optim.AdamW and with ours, and compares them."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import triton_optim

from ..util.provenance import device_name, provenance
from . import demo_record, demo_training, interpreter_check
from .demo_terminal import open_console, print_dispatch, print_step_times, print_trainings, progress_bar, say
from .demo_training import TRAININGS, Training, largest_difference, ratios_to_fused
from .own_process import ProcessError

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_EPOCHS = 20
NEEDED_ACCURACY = 0.97
ALLOWED_ACCURACY_DIFFERENCE = 0.01  # 4.5 of the 450 test images
TIMED_ROUNDS, WARMUP_ROUNDS = 60, 5
EXTRAS = {"rich": "rich", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}  # module: distribution


class DemoError(Exception):
    """The demo cannot start; the message is one line of value, cause and fix."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--epochs", type=int, default=DEFAULT_EPOCHS, help="epochs of each training (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batch order (default: %(default)s)")
    parser.add_argument("--device", help="where to train (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--plot",
        type=Path,
        default=Path("triton_optim_demo.png"),
        metavar="FILE",
        help="where the plot of the loss curves goes (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")


def run(args: argparse.Namespace) -> int:
    """Runs the demo; 0 if the two optimizers agree, 1 if they do not or if the demo cannot start."""
    try:
        device = checked_device(args)
    except DemoError as error:
        print(error, file=sys.stderr)
        return 1
    console = open_console()
    with demo_training.one_thread():
        record = {
            "command": command_line(args),
            **provenance(device, ("scikit-learn",)),
            "settings": {
                "epochs": args.epochs,
                "seed": args.seed,
                "device": str(device),
                "batch": demo_training.BATCH,
                "needed_accuracy": NEEDED_ACCURACY,
                "allowed_accuracy_difference": ALLOWED_ACCURACY_DIFFERENCE,
            },
            **measure(console, device, args),
        }
    failures = failures_of(record)
    record["failures"] = failures
    title = f"A small CNN on scikit-learn's digits: {args.epochs} epochs, seed {args.seed}, {device.type}"
    curves = {name: training["losses"] for name, training in record["trainings"].items()}
    demo_record.save_plot(args.plot, curves, title)
    say(console, f"\nPlot of the loss curves: {args.plot}")
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        say(console, f"Everything measured: {args.json}")
    for failure in failures:
        say(console, f"FAILED: {failure}", style="bold red")
    if not failures:
        say(console, "PASSED: the same accuracy, by the same path.", style="bold green")
    return 1 if failures else 0


def checked_device(args: argparse.Namespace) -> torch.device:
    """Finds, before any work, whatever would stop the demo halfway.

    Raises:
        DemoError: an extra is missing, the device is not there, or an option has no usable value.
    """
    missing = [distribution for module, distribution in EXTRAS.items() if find_spec(module) is None]
    if missing:
        raise DemoError(
            f"triton-optim demo needs {', '.join(missing)}: not installed in {sys.prefix}. "
            'Install the extra: pip install -e ".[demo]"'
        )
    if args.epochs < 1:
        raise DemoError(f"--epochs {args.epochs} trains nothing. Give 1 or more ({DEFAULT_EPOCHS} is the default).")
    for option, path in (("--plot", args.plot), ("--json", args.json)):
        if path is not None and not path.absolute().parent.is_dir():
            raise DemoError(f"{option} {path}: the folder {path.parent} does not exist. Create it first.")
    if args.plot.suffix[1:].lower() not in demo_record.plot_formats():
        raise DemoError(f"--plot {args.plot}: the suffix names no image format. Use .png, .pdf or .svg.")
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # a CPU build of torch asserts that it has CUDA
        cause = str(error).splitlines()[0].rstrip(".")
        raise DemoError(
            f"--device {args.device} cannot be used: {cause}. Leave it out to choose automatically."
        ) from None
    return device


def command_line(args: argparse.Namespace) -> str:
    """The command as it was given."""
    words = ["triton-optim", "demo"]
    for option in ("epochs", "seed", "device", "plot", "json"):
        value = getattr(args, option)
        words += [] if value is None else [f"--{option}", str(value)]
    return shlex.join(words)


def measure(console: Console, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Trains, times and checks, printing each result as soon as it is there."""
    digits = demo_training.load_digits(device)
    say(
        console,
        f"triton-optim demo: {len(digits.train_labels)} handwritten digits to learn, "
        f"{len(digits.test_labels)} to test, on {device_name(device)}, one CPU thread",
    )
    steps = args.epochs * demo_training.steps_per_epoch(digits)
    trainings: dict[str, Training] = {}
    with progress_bar(console) as progress:
        for name, (label, build) in TRAININGS.items():
            task = progress.add_task(f"training with {label}", total=steps)
            trainings[name] = demo_training.train(
                build,
                digits,
                args.epochs,
                args.seed,
                lambda task=task: progress.advance(task),  # type: ignore[misc]
            )
        task = progress.add_task("timing the steps", total=TIMED_ROUNDS + WARMUP_ROUNDS)
        times = demo_training.step_times(digits, args.seed, TIMED_ROUNDS, WARMUP_ROUNDS, lambda: progress.advance(task))
    differences = {
        name: largest_difference(trainings[name].losses, trainings["torch"].losses) for name in ("ours", "torch_fused")
    }
    print_trainings(console, trainings, differences)
    print_step_times(console, times)
    explanation = triton_optim.explain(trained_by_us(trainings))
    print_dispatch(console, explanation)
    backends = sorted({bucket.backend for bucket in explanation})
    return {
        "trainings": {
            name: {
                "accuracy": training.accuracy,
                "losses": training.losses,
                "seconds": training.seconds,
                "first_step_seconds": training.first_step_seconds,
            }
            for name, training in trainings.items()
        },
        "largest_loss_difference_from_torch": differences,
        "step_times": {
            "tensors": times.tensors,
            "elements": times.elements,
            "median_seconds": {name: statistics.median(taken) for name, taken in times.seconds.items()},
            "ratio_to_torch_fused": ratios_to_fused(times),
            "seconds": times.seconds,
        },
        "explain": {"backends": backends, "text": str(explanation)},
        "interpreter": None if "triton" in backends else check_in_interpreter(console),
    }


def trained_by_us(trainings: dict[str, Training]) -> triton_optim.RuleOptimizer:
    """The optimizer of the first training of ours."""
    optimizer = trainings["ours"].optimizer
    assert isinstance(optimizer, triton_optim.RuleOptimizer)
    return optimizer


def check_in_interpreter(console: Console) -> dict[str, Any]:
    """Check the kernels in a process where Triton interprets them."""
    say(console, "\nThe Triton kernels themselves, in Triton's interpreter on the CPU", style="bold")
    try:
        with console.status("running the kernels"):
            measured = interpreter_check.run_interpreter_check()
    except ModuleNotFoundError as error:  # no Triton for this platform: nothing is wrong
        say(console, f"Not run: {error}")
        return {"ran": False, "reason": str(error)}
    except ProcessError as error:
        return {"ran": False, "error": str(error)}
    say(
        console,
        f"{measured['steps']} steps of {measured['tensors']} small tensors, odd sizes among them: at most "
        f"{measured['largest_difference']:.1e}\nfrom torch.optim.AdamW ({measured['limit']:g} is allowed)",
    )
    return {"ran": True, **measured}


def failures_of(record: dict[str, Any]) -> list[str]:
    """What is wrong with the measurements, one sentence each. NaN passes no comparison here."""
    failures = []
    accuracies = {name: record["trainings"][name]["accuracy"] for name in ("torch", "ours")}
    longer = max(DEFAULT_EPOCHS, 2 * record["settings"]["epochs"])
    for name, accuracy in accuracies.items():
        if not accuracy > NEEDED_ACCURACY:
            failures.append(
                f"{TRAININGS[name][0]} reads {accuracy:.2%} of the test digits; more than "
                f"{NEEDED_ACCURACY:.0%} is needed. Train longer: --epochs {longer}"
            )
    difference = abs(accuracies["ours"] - accuracies["torch"])
    if not difference <= ALLOWED_ACCURACY_DIFFERENCE:
        failures.append(
            f"the accuracies differ by {100 * difference:.2f} percentage points; "
            f"{100 * ALLOWED_ACCURACY_DIFFERENCE:g} is allowed"
        )
    interpreter = record["interpreter"] or {}
    if "error" in interpreter:
        failures.append(interpreter["error"])
    if interpreter.get("ran") and not interpreter["largest_difference"] <= interpreter["limit"]:
        failures.append(
            f"the kernels in the interpreter are {interpreter['largest_difference']:.1e} from "
            f"torch.optim.AdamW; {interpreter['limit']:g} is allowed"
        )
    return failures
