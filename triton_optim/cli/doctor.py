"""``triton-optim doctor``: what is installed, whether a Triton launch works, and what the dispatcher would choose."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from ..backends.triton.stub_driver import TARGETS
from ..dispatch import BACKENDS, Machine, Request, choose, cxx_compiler, this_machine, unable
from ..util.cpp_build import BuildError, folder
from ..util.devices import accelerator
from ..util.files import write_json
from ..util.gather import library
from ..util.provenance import installed_version
from ..util.table import short, table
from .launch_check import check_launch, places

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write it as JSON")


def devices() -> dict[str, str]:
    """The devices torch sees: the kind and what it is."""
    found = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    if (gpu := accelerator()) is not None:
        module = torch.get_device_module(gpu)
        name = module.get_device_name() if hasattr(module, "get_device_name") else gpu.type
        found[gpu.type] = f"{torch.accelerator.device_count()} x {name}"
    return found


def libraries() -> str:
    """Where C++ libraries are kept, or why there is no such place."""
    try:
        return str(folder())
    except BuildError as error:
        return str(error)


def diagnosis(machine: Machine) -> dict[str, Any]:
    """All that the command tells."""
    library.load()  # as a training would, once it has gone on for a while
    present = devices()
    kinds = [*present, *(kind for kind in ("cuda", "xpu", "mps") if kind not in present)]
    choices = []
    for kind in kinds:
        for dtype in DTYPES if kind != "mps" else DTYPES[:3]:  # Metal has no float64
            request = Request(kind, dtype)
            choice = choose(request, machine)
            choices.append(
                {
                    "device": kind,
                    "present": kind in present,
                    "dtype": short(dtype),
                    "backend": choice.backend,
                    "reason": choice.reason,
                    "also": [b for b in BACKENDS if b != choice.backend and unable(b, request, machine) is None],
                }
            )
    return {
        "versions": {name: installed_version(name) for name in ("triton-optim", "torch", "triton")},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "devices": present,
        "cxx_compiler": cxx_compiler(),
        "cpp_libraries": libraries(),
        "gathers_gradients": library.loaded is not None,
        "gathers_gradients_obstacle": library.build_error,
        "interpreter": machine.interpreter,
        "triton_launches": [check_launch(where) for where in places()] if machine.triton and machine.sources else [],
        "choices": choices,
    }


def words(launch: dict[str, Any]) -> str:
    """What came of a launch, in a line."""
    where = launch["where"]
    if not launch["works"]:
        return f"{where}: FAILED at the stage {launch['stage']!r}: {launch['error']}"
    if where in TARGETS:
        return f"no GPU: compiled for {where} and launched into a stub driver, {launch['seconds']:.1f} s"
    return f"works on {where}: AdamW in three dtypes is as eager, {launch['seconds']:.1f} s"


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis. The exit status is 1 where a launch failed."""
    print("Compiling and launching a step, which takes some seconds ...", file=sys.stderr, flush=True)
    found = diagnosis(this_machine())
    facts = [[name, value or "not installed"] for name, value in found["versions"].items()]
    facts += [["python", found["python"]], ["platform", found["platform"]]]
    facts += [[kind, what] for kind, what in found["devices"].items()]
    missing = "none found (the C++ and compiled backends on a CPU need one; or set CXX)"
    facts += [["C++ compiler", found["cxx_compiler"] or missing], ["C++ libraries", found["cpp_libraries"]]]
    gathers = "in one C++ call" if found["gathers_gradients"] else f"one by one: {found['gathers_gradients_obstacle']}"
    facts += [["gradients are found", gathers]]
    facts += [["Triton launch", words(launch)] for launch in found["triton_launches"]]
    facts += [["TRITON_INTERPRET", "on: Triton kernels run on CPU tensors" if found["interpreter"] else "off"]]
    print(table(["", "found"], facts))
    failed = [launch for launch in found["triton_launches"] if not launch["works"]]
    print("".join(f"\nTriton launch, {launch['where']}: {launch['advice']}\n" for launch in failed))
    rows = [
        [
            c["device"] + ("" if c["present"] else " (not here)"),
            c["dtype"],
            c["backend"],
            c["reason"],
            ", ".join(c["also"]),
        ]
        for c in found["choices"]
    ]
    print(table(["device", "dtype", "auto", "reason", "could be pinned"], rows))
    if args.json:
        write_json(args.json, found)
    return 1 if failed else 0
