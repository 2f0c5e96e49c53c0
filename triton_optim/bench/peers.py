"""What a step is measured against: torch's own optimizers, those of other packages, and a user's."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..util.named import load


class Unavailable(Exception):
    """A peer cannot take part; the message is the reason."""


@dataclass(frozen=True)
class Peer:
    """Where the optimizers of a peer are.

    Attributes:
        distribution: what to install.
        module: what to import.
        pattern: of its classes' names, without regard to case; ``{}`` stands for the optimizer's name.
        options: what they are constructed with beside the hyperparameters.
        share: how much of the update their results may differ by; None is what rounding explains.
        compiled: whether ``torch.compile`` compiles the step, in the peer's own way if it has one.
        classes: of ours, what the peer has under another name or with other defaults: its class, and what that is
            constructed with.
    """

    distribution: str
    module: str
    pattern: str = "{}"
    options: Mapping[str, Any] = field(default_factory=dict)
    share: float | None = None
    compiled: bool = False
    classes: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)


# Of 11 optimizers, ours and others', results with quantized states of 8 bits were 0.8 % off at most, of 4 bits 11 %.
CODES_OF_8_BITS, CODES_OF_4_BITS = 0.03, 0.2

# What pytorch_optimizer calls otherwise, or has other defaults of.
_RATE = 0.1  # of benchmarks, which it has twice
_KOZ: dict[str, tuple[str, Mapping[str, Any]]] = {
    "Adan": ("Adan", {"weight_decouple": False}),  # which is the proximal one
    "AdEMAMix": ("AdEMAMix", {"weight_decouple": True}),
    "MARSAdamW": ("MARS", {"lr_1d": _RATE, "weight_decay_1d": 0.0}),
    "RAdam": ("RAdam", {"weight_decouple": False, "degenerated_to_sgd": True}),
    "Signum": ("SignSGD", {}),
    "StableAdamW": ("StableAdamW", {"kahan_sum": False}),
}
_FREE: dict[str, tuple[str, Mapping[str, Any]]] = {
    f"ScheduleFree{base}": (f"{base}ScheduleFree", {}) for base in ("AdamW", "RAdam", "SGD")
}

PEERS: dict[str, Peer] = {
    "torch-fused": Peer("torch", "torch.optim", options={"fused": True}),
    "torch-foreach": Peer("torch", "torch.optim", options={"foreach": True}),
    "torch-for-loop": Peer("torch", "torch.optim", options={"foreach": False}),
    "torch-compiled": Peer("torch", "torch.optim", options={"foreach": True}, compiled=True),
    "optimi": Peer("torch-optimi", "optimi", options={"kahan_sum": False}),
    "pytorch_optimizer": Peer("pytorch_optimizer", "pytorch_optimizer", classes=_KOZ),  # by torch's foreach functions
    "pytorch_optimizer-for-loop": Peer(
        "pytorch_optimizer", "pytorch_optimizer", options={"foreach": False}, classes=_KOZ
    ),
    "pytorch_optimizer-compiled": Peer(
        "pytorch_optimizer", "pytorch_optimizer", options={"foreach": True}, compiled=True, classes=_KOZ
    ),
    "schedulefree": Peer("schedulefree", "schedulefree", classes=_FREE),
    "prodigyopt": Peer("prodigyopt", "prodigyopt"),
    "heavyball": Peer("heavyball", "heavyball", classes={"ScheduleFreeAdamW": ("SFAdamW", {})}),  # compiles by default
    "bitsandbytes": Peer("bitsandbytes", "bitsandbytes.optim", "{}32bit"),
    "bitsandbytes-8bit": Peer("bitsandbytes", "bitsandbytes.optim", "{}8bit", share=CODES_OF_8_BITS),
    "torchao-8bit": Peer("torchao", "torchao.optim", "{}8bit", share=CODES_OF_8_BITS),
    "torchao-4bit": Peer("torchao", "torchao.optim", "{}4bit", share=CODES_OF_4_BITS),
    "flashoptim": Peer("flashoptim", "flashoptim", "Flash{}", share=CODES_OF_8_BITS),
}


def check_peer(name: str) -> None:
    """Raise ValueError unless `name` is one of `PEERS` or a user's own that can be loaded."""
    if name in PEERS:
        return
    if ":" not in name:
        raise ValueError(
            f"--against {name}: there is none. Choose from {', '.join(PEERS)}, or name yours as mymodule:MyOptimizer."
        )
    load("--against", name)


def allowed_share(name: str) -> float | None:
    """How much of the update the results of a peer may differ by; None is what rounding explains."""
    return PEERS[name].share if name in PEERS else None


def peer_optimizer(
    name: str, optimizer: str, params: Sequence[Tensor], hyperparameters: Mapping[str, Any]
) -> tuple[Optimizer, Callable[[], Any]]:
    """A peer's optimizer of that name, and its step.

    Args:
        name: one of `PEERS`, or ``module:name`` of a class, or of a function that returns an optimizer.
        optimizer: the name of torch's or this package's class, such as ``"AdamW"``.
        params: what it updates.
        hyperparameters: by torch's names. What the peer does not take is left out.

    Raises:
        Unavailable: the peer is not installed, has no such optimizer, or cannot be constructed.
    """
    peer = PEERS.get(name)
    options = {} if peer is None else {**peer.options, **peer.classes.get(optimizer, ("", {}))[1]}
    make = load("--against", name) if peer is None else peer_class(peer, optimizer)
    arguments = accepted(make, hyperparameters, options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = make(params, **arguments)
    except Exception as error:  # whatever another package raises
        raise Unavailable(first_line(error)) from error
    if not isinstance(made, Optimizer):
        raise Unavailable(f"{name} made a {type(made).__name__}, which is no torch.optim.Optimizer")
    start_training(made)
    if hasattr(made, "consume_grad"):  # heavyball's, which takes the gradients away
        made.consume_grad = False
    if peer is None or not peer.compiled:
        return made, made.step
    # All of torch's optimizers compile one function: after eight of them it would be run as it is.
    torch.compiler.reset()
    if getattr(made, "_supports_compiled_foreach", False):  # pytorch_optimizer's way
        made._compile_foreach()  # type: ignore[attr-defined]
        return made, made.step
    return made, torch.compile(made.step)


def start_training(optimizer: Optimizer) -> None:
    """Have an optimizer train that evaluates elsewhere."""
    if callable(train := getattr(optimizer, "train", None)):
        train()


def peer_class(peer: Peer, optimizer: str) -> type[Optimizer]:
    """The class of a peer that is to be compared with `optimizer`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(peer.module)
    except ModuleNotFoundError as error:
        raise Unavailable(f"not installed: pip install {peer.distribution} ({first_line(error)})") from error
    except Exception as error:
        raise Unavailable(f"importing it failed: {first_line(error)}") from error
    wanted, _ = peer.classes.get(optimizer, (peer.pattern.format(optimizer), {}))
    classes = {
        name.lower(): value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Optimizer)
    }
    found = classes.get(wanted.lower())
    if found is None:
        raise Unavailable(f"{peer.module} has no {wanted}")
    if peer.distribution != "torch" and found.__module__.startswith("torch."):
        raise Unavailable(f"its {wanted} is torch's own")
    return found


def accepted(
    make: Callable[..., Any], hyperparameters: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Those of the hyperparameters and options that `make` takes by name.

    What it does not take it may do all the same: its results will tell.

    Raises:
        Unavailable: it does not take an option that is not off.
    """
    known = inspect.signature(make).parameters
    for option, value in options.items():
        if option not in known and value:
            raise Unavailable(f"{getattr(make, '__name__', make)} takes no {option}")
    return {option: value for option, value in {**hyperparameters, **options}.items() if option in known}


def first_line(error: Exception) -> str:
    """What is said in a table of an exception."""
    text = str(error).strip().partition("\n")[0].strip()
    return text if text and len(text) < 200 else f"{type(error).__name__}{f': {text[:150]}...' if text else ''}"
