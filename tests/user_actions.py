"""What Python lets a user do to an optimizer between steps, as actions on a side: ours, or torch's beside it.

Here are those on gradients and parameters; the others are in user_actions_on_states.py and user_actions_on_groups.py.

An action draws all that it chooses from a random.Random. Both sides are alike and get one of the same seed, so that the
same happens to both.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter
from user_sides import (
    DENSE,
    LAYOUTS,
    Action,
    Side,
    action,
    resizable,
    two_alike,
    values,
    writable,
)

PARAMETERS: dict[str, Action] = {}
GRADIENTS: dict[str, Action] = {}


def give(side: Side, p: Parameter, draw: random.Random, kind: str) -> None:
    """A gradient of one kind or another."""
    if p.grad is not None and p.grad.dtype != p.dtype:
        p.grad = None
    p.grad_dtype = p.dtype
    value = values(draw, p.shape, p.dtype)
    other = draw.choice((torch.float32, torch.float64, torch.bfloat16))
    if kind == "in place" and p.grad is not None and p.grad.shape == p.shape and writable(p.grad):
        p.grad.copy_(value)
    elif kind == "data" and p.grad is not None and not p.grad.is_inference():
        p.grad.data = side.laid(value, draw.choice(LAYOUTS))
    elif kind == "expanded":
        p.grad = values(draw, (), p.dtype).expand(p.shape)
    elif kind == "negative":
        p.grad = torch._neg_view(value)
    elif kind == "inference":
        with torch.inference_mode():
            p.grad = value.clone()
    elif kind == "other dtype":
        p.grad = None
        p.grad_dtype = other
        p.grad = value.to(other)
    elif kind == "backward":
        if p.grad is not None and not writable(p.grad):
            p.grad = None
        if p.requires_grad and not p.is_inference():
            with torch.enable_grad():
                (p * value).sum().backward()
    else:
        p.grad = side.laid(value, kind if kind in LAYOUTS else "plain")


KINDS = ("plain", "in place", "backward", *LAYOUTS[1:], "data", "expanded", "negative", "inference", "other dtype")


def give_all(side: Side, draw: random.Random, kind: str, missing: float = 0.0) -> None:
    """A gradient to every parameter, but to some none."""
    for p in side.params:
        if draw.random() < missing:
            p.grad = None
        else:
            give(side, p, draw, kind if kind != "any" else draw.choice(KINDS))


# Gradients.


@action(GRADIENTS)
def one_new_gradient(side: Side, draw: random.Random) -> None:
    give(side, side.pick(draw), draw, draw.choice(KINDS))


@action(GRADIENTS)
def one_gradient_less(side: Side, draw: random.Random) -> None:
    side.pick(draw).grad = None


@action(GRADIENTS)
def zero_grad(side: Side, draw: random.Random) -> None:
    side.opt.zero_grad(set_to_none=draw.random() < 0.5)


@action(GRADIENTS)
def zero_grad_in_another_thread(side: Side, draw: random.Random) -> None:
    in_another_thread(lambda: side.opt.zero_grad(set_to_none=draw.random() < 0.7))


@action(GRADIENTS)
def swapped_gradients(side: Side, draw: random.Random) -> None:
    p, q = two_alike(side, draw)
    if p is not None and q is not None and p.grad is not None and q.grad is not None and p.grad.dtype == q.grad.dtype:
        p.grad.data, q.grad.data = q.grad.data, p.grad.data


@action(GRADIENTS)
def shared_gradient(side: Side, draw: random.Random) -> None:
    p, q = two_alike(side, draw)
    if p is not None and q is not None and q.grad is not None and q.grad.dtype == p.dtype:
        p.grad_dtype = p.dtype
        p.grad = q.grad


@action(GRADIENTS)
def gradient_of_another_shape(side: Side, draw: random.Random) -> None:
    p = side.pick(draw)
    if p.grad is not None:
        p.grad.data = values(draw, draw.choice(side.shapes), p.grad.dtype)


def in_another_thread(function: Callable[[], Any]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


# Parameters.


@action(PARAMETERS)
def data(side: Side, draw: random.Random) -> None:
    p = side.pick(draw)
    side.replaced(p)
    p.data = side.laid(p if draw.random() < 0.5 else values(draw, p.shape, p.dtype), draw.choice(LAYOUTS))


@action(PARAMETERS)
def data_of_all(side: Side, draw: random.Random) -> None:
    how = draw.choice(DENSE)
    for p in side.params:
        side.replaced(p)
        p.data = side.laid(p, how)


@action(PARAMETERS)
def data_of_another_shape(side: Side, draw: random.Random) -> None:
    p = side.pick(draw)
    side.replaced(p)
    p.data = values(draw, draw.choice(side.shapes), p.dtype)
    if draw.random() < 0.7:
        p.grad = None
    if draw.random() < 0.5:
        side.opt.state.pop(p, None)


@action(PARAMETERS)
def data_of_another_dtype(side: Side, draw: random.Random) -> None:
    p, dtype = side.pick(draw), draw.choice((torch.float32, torch.float64))
    side.replaced(p)
    p.grad = None
    p.data = p.data.to(dtype)
    p.grad_dtype = dtype


@action(PARAMETERS)
def cast_and_back(side: Side, draw: random.Random) -> None:
    dtypes = [p.dtype for p in side.params]
    for p in side.params:
        side.replaced(p)
        p.data = p.data.double()
    for p, dtype in zip(side.params, dtypes, strict=True):
        p.data = p.data.to(dtype)


@action(PARAMETERS)
def cast(side: Side, draw: random.Random) -> None:
    dtype = draw.choice((torch.float32, torch.float64))
    for p in side.params:
        side.replaced(p)
        p.grad = None
        p.data = p.data.to(dtype)
        p.grad_dtype = dtype


@action(PARAMETERS)
def set_parameter(side: Side, draw: random.Random) -> None:
    p = side.pick(draw)
    side.replaced(p)
    with torch.no_grad():
        p.set_(side.laid(p, draw.choice(LAYOUTS)))


@action(PARAMETERS)
def grow_storage(side: Side, draw: random.Random) -> None:
    p = side.pick(draw)
    if not resizable(p):
        return
    side.forget(p)
    p.untyped_storage().resize_(p.untyped_storage().nbytes() + draw.choice((64, 1 << 16)))


@action(PARAMETERS)
def storage_freed_and_back(side: Side, draw: random.Random) -> None:
    p = side.pick(draw)
    if not resizable(p):
        return
    side.forget(p)
    storage, kept = p.untyped_storage(), p.detach().clone()
    size = storage.nbytes()
    storage.resize_(0)
    between = torch.empty(size, dtype=torch.uint8)  # so that it comes to lie elsewhere
    storage.resize_(size)
    del between
    p.data.copy_(kept)


@action(PARAMETERS)
def values_in_place(side: Side, draw: random.Random) -> None:
    p = side.pick(draw)
    p.data.mul_(0.5)


@action(PARAMETERS)
def freeze_or_unfreeze(side: Side, draw: random.Random) -> None:
    p = side.pick(draw)
    p.requires_grad_(not p.requires_grad)


@action(PARAMETERS)
def freeze_all(side: Side, draw: random.Random) -> None:
    on = draw.random() < 0.5
    for p in side.params:
        p.requires_grad_(on)


@action(PARAMETERS)
def share_memory(side: Side, draw: random.Random) -> None:
    p = side.pick(draw)
    side.forget(p)
    p.share_memory_()


@action(PARAMETERS)
def swapped_data(side: Side, draw: random.Random) -> None:
    p, q = two_alike(side, draw)
    if p is not None and q is not None:
        p.data, q.data = q.data, p.data


@action(PARAMETERS)
def tied_data(side: Side, draw: random.Random) -> None:
    p, q = two_alike(side, draw)
    if p is not None and q is not None:
        side.replaced(q)
        q.data = p.data


@action(PARAMETERS)
def swap_tensors(side: Side, draw: random.Random) -> None:
    p = side.pick(draw)
    p.grad = None
    new = Parameter(side.laid(p, draw.choice(LAYOUTS)))
    torch.utils.swap_tensors(p, new)


@action(PARAMETERS)
def inference_data(side: Side, draw: random.Random) -> None:
    p = side.pick(draw)
    side.replaced(p)
    with torch.inference_mode():
        new = p.detach().clone()
    p.data = new
