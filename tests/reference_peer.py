"""A reference as one of torch's optimizers: what stands beside ours where torch.optim has none to compare with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container
from functools import cache
from typing import Any

import numpy as np
import torch
from references_runner import begin, spread, step
from torch import Tensor

OPTIONS = {"maximize": False, "foreach": None, "fused": None, "capturable": False, "differentiable": False}


@cache
def peer_of(reference: Callable[..., Any], *numbers: tuple[str, torch.dtype]) -> type[torch.optim.Optimizer]:
    """A class that computes in float64 where the parameter is so wide, else in float32, and keeps torch's states.

    Args:
        numbers: the states that are numbers, and their dtypes; all others are tensors that belong to elements.
    """
    dtypes = dict(numbers)
    p, _, _, *hyperparameters = inspect.signature(reference).parameters.values()
    optional = [inspect.Parameter(n, p.KEYWORD_ONLY, default=default) for n, default in OPTIONS.items()]

    class Peer(torch.optim.Optimizer):
        __signature__ = inspect.Signature([p.replace(name="params"), *hyperparameters, *optional])

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = self.__signature__.bind(*args, **kwargs)
            given.apply_defaults()
            params, *_ = given.arguments.values()
            super().__init__(params, {n: v for n, v in given.arguments.items() if n != "params"})

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            here = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
            twice = len({id(p) for _, p in here}) < len(here)
            for turn in [[one] for one in here] if twice else [here]:
                self.turn(turn)
            return loss

        def turn(self, turn: list[tuple[dict[str, Any], Tensor]]) -> None:
            """One step of these parameters, each with its group."""
            states = [self.state[p] for _, p in turn]
            begin(list(self.state.values()), states, reference.of_model)
            begun: list[Any] = []
            for (group, p), state in zip(turn, states, strict=True):
                h = {x.name: number(group[x.name]) for x in hyperparameters}
                g, arrays = array(p.grad), arrays_of(state, dtypes)
                with np.errstate(all="ignore"):
                    update = reference.__wrapped__(array(p), -g if group["maximize"] else g, arrays, **h)
                if not inspect.isgenerator(update):  # it is done before the next reads what both may have
                    take(p, state, update, arrays, dtypes)
                begun.append((update, arrays))
            with np.errstate(all="ignore"):
                ended = step([update for update, _ in begun])
            for (_, p), state, new, (update, arrays) in zip(turn, states, ended, begun, strict=True):
                if inspect.isgenerator(update):
                    take(p, state, new, arrays, dtypes)
            spread(list(self.state.values()), states, reference.of_model)

    Peer.__name__ = Peer.__qualname__ = f"{reference.__name__}_peer"
    globals()[Peer.__name__] = Peer  # where pickle looks for it
    return Peer


def arrays_of(state: dict[str, Any], numbers: Container[str]) -> dict[str, Any]:
    """A state as a reference takes it: a number is one, the count an int."""
    arrays = {name: number(value) if name in numbers else array(value) for name, value in state.items()}
    return arrays | {name: int(value) for name, value in arrays.items() if name == "step"}


def take(
    p: Tensor, state: dict[str, Any], new: np.ndarray, arrays: dict[str, Any], numbers: dict[str, torch.dtype]
) -> None:
    """Write a parameter and its state; in this a number is a tensor."""
    new = tensor(new, p)
    kept = {n: one(v, numbers[n]) if n in numbers else tensor(v, p) for n, v in arrays.items()}
    p.copy_(new)
    for name, value in kept.items():  # where it lies, as torch does: another parameter may have the same
        own = state.setdefault(name, value)
        if (own.shape, own.dtype, own.device) == (value.shape, value.dtype, value.device):
            own.copy_(value)
        else:
            state[name] = value


def one(value: Any, dtype: torch.dtype) -> Tensor:
    """A state that is a number: in float64 where that is torch's default, too."""
    return torch.tensor(float(value), dtype=torch.promote_types(dtype, torch.get_default_dtype()))


def number(value: Any) -> Any:
    return (
        tuple(map(number, value)) if isinstance(value, tuple) else value.item() if isinstance(value, Tensor) else value
    )


def array(x: Tensor) -> np.ndarray:
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.detach().to("cpu", torch.promote_types(x.dtype, torch.float32)).numpy()


def tensor(values: Any, like: Tensor) -> Tensor:
    """A tensor as `like`, laid out as it is in memory."""
    x = torch.as_tensor(np.array(values)).to(like.device)
    if x.shape != (torch.view_as_real(like) if like.is_complex() else like).shape:
        return x  # a number of the parameter, or of each of its rows
    return torch.empty_like(like).copy_(torch.view_as_complex(x) if like.is_complex() else x)
