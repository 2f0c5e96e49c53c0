"""What Python lets a user do to an optimizer between steps, as actions on a side: ours, or torch's beside it.

An action draws all that it chooses from a random.Random. Both sides are alike and get one of the same seed, so that the
same happens to both.
"""

from __future__ import annotations

import copy
import math
import pickle
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

CANARY = 12345.0
PAD = 16
LAYOUTS = ("plain", "transposed", "gaps", "shifted", "padded")
SHAPES = ((4, 3), (3,), (), (1,), (0,), (5, 1), (2, 3, 4), (2, 2, 2, 2), (7,))

Action = Callable[["Side", random.Random], None]
PARAMETERS: dict[str, Action] = {}
GRADIENTS: dict[str, Action] = {}
STATES: dict[str, Action] = {}
GROUPS: dict[str, Action] = {}
OPTIONS: dict[str, Action] = {}
COPIES: dict[str, Action] = {}


def action(table: dict[str, Action]) -> Callable[[Action], Action]:
    """Enter the decorated function in a table, by its name."""

    def enter(function: Action) -> Action:
        table[function.__name__] = function
        return function

    return enter


class Memory:
    """Memory that no step may write: what lies around a tensor, and what was replaced.

    Args:
        remembers: whether what is replaced is kept. Without, it is freed, and its address is soon another tensor's.
    """

    def __init__(self, remembers: bool) -> None:
        self._remembers = remembers
        self._around: list[tuple[Tensor, Tensor]] = []
        self._replaced: list[tuple[Tensor, Tensor]] = []

    def guard(self, buffer: Tensor, view: Tensor) -> None:
        """Watch the elements of `buffer` that are not of `view`."""
        inside = torch.zeros(len(buffer), dtype=torch.bool)
        inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        self._around.append((buffer, ~inside))

    def replaced(self, tensor: Tensor) -> None:
        """Watch a tensor that the optimizer has no more."""
        if self._remembers and tensor.numel():
            self._replaced.append((tensor.detach(), tensor.detach().clone()))

    def forget(self, tensor: Tensor) -> None:
        """Watch nothing of a storage that is about to be resized."""
        own = storage_of(tensor)
        self._around = [pair for pair in self._around if storage_of(pair[0]) != own]
        self._replaced = [pair for pair in self._replaced if storage_of(pair[0]) != own]

    def check(self, live: list[Tensor]) -> None:
        for buffer, outside in self._around:
            assert bool((buffer[outside] == CANARY).all()), "a step wrote beside a tensor"
        used = set(map(storage_of, live))
        for tensor, before in self._replaced:
            if storage_of(tensor) in used:
                before.copy_(tensor)
            else:
                assert equal(tensor, before), "a step wrote a tensor that had been replaced"


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


class Side:
    """Parameters and their optimizer.

    Args:
        make: makes an optimizer of this side from groups.
        groups: of new parameters.
        memory: to watch; None for torch's.
        shapes: that parameters may have.
    """

    def __init__(
        self, make: Callable[[Any], Any], groups: Any, memory: Memory | None, shapes: tuple[tuple[int, ...], ...]
    ) -> None:
        self.make, self.memory, self.shapes = make, memory, shapes
        self.opt = make(groups)
        self.spare: list[Parameter] = []
        self.saved: Any = None

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.opt.param_groups

    @property
    def params(self) -> list[Parameter]:
        return [p for group in self.groups for p in group["params"]]

    def pick(self, draw: random.Random) -> Parameter:
        """Any of the parameters, often one in the middle."""
        return draw.choice(self.params)

    def states(self) -> Iterator[tuple[Parameter, str, Tensor]]:
        """Every state that has elements, with its parameter and name."""
        for p in self.params:
            for name, value in self.opt.state.get(p, {}).items():
                if isinstance(value, Tensor) and name not in NUMBERS and value.numel():
                    yield p, name, value

    def pick_state(self, draw: random.Random) -> tuple[Parameter, str, Tensor] | None:
        found = list(self.states())
        return draw.choice(found) if found else None

    def counts(self) -> list[Tensor]:
        """The steps of all parameters that have one as a tensor."""
        steps = [self.opt.state.get(p, {}).get("step") for p in self.params]
        return [step for step in steps if isinstance(step, Tensor)]

    def laid(self, value: Tensor, how: str) -> Tensor:
        """A copy of `value`, lying in memory as `how` says."""
        value = value.detach()
        order = list(range(value.dim()))[::-1]
        if how == "transposed":
            return value.permute(order).contiguous().permute(order).clone(memory_format=torch.preserve_format)
        if how == "plain" or not value.is_floating_point():
            return value.clone(memory_format=torch.contiguous_format)
        apart = 2 if how == "gaps" else 1
        strides = [apart * math.prod(value.shape[d + 1 :]) for d in range(value.dim())]
        buffer = torch.full((2 * PAD + apart * value.numel(),), CANARY, dtype=value.dtype)
        view = buffer.as_strided(value.shape, strides, PAD + (how == "shifted"))
        view.copy_(value)
        if self.memory is not None:
            self.memory.guard(buffer, view)
        return view

    def replaced(self, tensor: Any) -> None:
        if self.memory is not None and isinstance(tensor, Tensor):
            self.memory.replaced(tensor)

    def forget(self, tensor: Tensor) -> None:
        if self.memory is not None:
            self.memory.forget(tensor)

    def new_parameter(self, draw: random.Random, dtype: torch.dtype | None = None) -> Parameter:
        dtype = dtype or (self.params[0].dtype if self.params else torch.float32)
        return Parameter(self.laid(values(draw, draw.choice(self.shapes), dtype), draw.choice(DENSE)))


# Hyperparameters that are left: torch takes those of the constructor, whatever a group says; and what divides by 0.
STARTS = ("eps", "initial_accumulator_value")
NUMBERS = {"step", "mu_product", "eta", "mu", "num_sum", "exp_avg_lr", "n_averaged"}
DENSE = ("plain", "plain", "transposed", "shifted", "padded")


def values(draw: random.Random, shape: Any, dtype: torch.dtype) -> Tensor:
    """Normally distributed."""
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def writable(tensor: Tensor) -> bool:
    """Whether torch can write it in place."""
    return not tensor.is_inference() and all(n < 2 or s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def resizable(tensor: Tensor) -> bool:
    """Whether torch can resize its memory. Of what is shared between processes it can't, and does not say so."""
    return tensor.untyped_storage().resizable() and not tensor.is_shared()


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


def two_alike(side: Side, draw: random.Random) -> tuple[Parameter | None, Parameter | None]:
    """Two parameters of one shape and dtype."""
    p = side.pick(draw)
    others = [q for q in side.params if q is not p and q.shape == p.shape and q.dtype == p.dtype]
    return (p, draw.choice(others)) if others else (None, None)


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


# States.


@action(STATES)
def new_state(side: Side, draw: random.Random) -> None:
    if found := side.pick_state(draw):
        p, name, value = found
        side.replaced(value)
        side.opt.state[p][name] = side.laid(value, draw.choice(LAYOUTS))


@action(STATES)
def new_states(side: Side, draw: random.Random) -> None:
    how = draw.choice(LAYOUTS)
    for p, name, value in list(side.states()):
        side.replaced(value)
        side.opt.state[p][name] = side.laid(value, how)


@action(STATES)
def state_data(side: Side, draw: random.Random) -> None:
    if found := side.pick_state(draw):
        side.replaced(found[2])
        found[2].data = side.laid(found[2], draw.choice(LAYOUTS))


@action(STATES)
def offloaded_states(side: Side, draw: random.Random) -> None:
    for _, _, value in side.states():
        side.replaced(value)
        value.data = side.laid(value, "padded")


@action(STATES)
def set_state(side: Side, draw: random.Random) -> None:
    if found := side.pick_state(draw):
        side.replaced(found[2])
        found[2].set_(side.laid(found[2], draw.choice(LAYOUTS)))


@action(STATES)
def state_in_another_dtype(side: Side, draw: random.Random) -> None:
    if found := side.pick_state(draw):
        p, name, value = found
        side.replaced(value)
        side.opt.state[p][name] = value.to(draw.choice((torch.float64, torch.float32)))


@action(STATES)
def state_data_in_another_dtype(side: Side, draw: random.Random) -> None:
    if found := side.pick_state(draw):
        side.replaced(found[2])
        found[2].data = found[2].to(draw.choice((torch.float64, torch.float32)))


@action(STATES)
def state_storage_grown(side: Side, draw: random.Random) -> None:
    if (found := side.pick_state(draw)) and resizable(found[2]):
        side.forget(found[2])
        storage = found[2].untyped_storage()
        storage.resize_(storage.nbytes() + draw.choice((64, 1 << 16)))


@action(STATES)
def state_resized_and_back(side: Side, draw: random.Random) -> None:
    if found := side.pick_state(draw):
        value = found[2]
        if not (value.is_contiguous() and resizable(value)):
            return
        side.forget(value)
        kept = value.clone()
        value.resize_(1 << draw.choice((2, 12)))
        value.resize_(kept.shape).copy_(kept)


@action(STATES)
def state_of_another_size(side: Side, draw: random.Random) -> None:
    if found := side.pick_state(draw):
        p, name, value = found
        side.replaced(value)
        new = torch.zeros(draw.choice(side.shapes), dtype=value.dtype)
        if draw.random() < 0.5:
            value.data = new
        else:
            side.opt.state[p][name] = new


@action(STATES)
def state_storage_freed_and_back(side: Side, draw: random.Random) -> None:
    if (found := side.pick_state(draw)) and resizable(found[2]):
        side.forget(found[2])
        storage, kept = found[2].untyped_storage(), found[2].clone()
        size = storage.nbytes()
        storage.resize_(0)
        between = torch.empty(size, dtype=torch.uint8)
        storage.resize_(size)
        del between
        found[2].copy_(kept)


@action(STATES)
def state_written(side: Side, draw: random.Random) -> None:
    if (found := side.pick_state(draw)) and found[2].is_floating_point():
        found[2].mul_(0.5)


@action(STATES)
def states_zeroed(side: Side, draw: random.Random) -> None:
    for _, _, value in side.states():
        value.zero_()


@action(STATES)
def state_shared(side: Side, draw: random.Random) -> None:
    if found := side.pick_state(draw):
        side.forget(found[2])
        found[2].share_memory_()


@action(STATES)
def state_as_parameter(side: Side, draw: random.Random) -> None:
    if found := side.pick_state(draw):
        p, name, value = found
        side.opt.state[p][name] = Parameter(value, requires_grad=False)


@action(STATES)
def inference_state(side: Side, draw: random.Random) -> None:
    if found := side.pick_state(draw):
        p, name, value = found
        side.replaced(value)
        with torch.inference_mode():
            side.opt.state[p][name] = value.clone()


@action(STATES)
def states_tied(side: Side, draw: random.Random) -> None:
    p, q = two_alike(side, draw)
    if p is not None and q is not None:
        own, theirs = side.opt.state.get(p, {}), side.opt.state.get(q, {})
        for name in own:
            if name in theirs and name not in NUMBERS and isinstance(own[name], Tensor):
                side.replaced(own[name])
                if draw.random() < 0.5:
                    own[name] = theirs[name]
                else:
                    own[name].data = theirs[name]


@action(STATES)
def states_swapped(side: Side, draw: random.Random) -> None:
    p, q = two_alike(side, draw)
    state = side.opt.state
    if p in state and q in state:
        state[p], state[q] = state[q], state[p]


@action(STATES)
def states_as_plain_dicts(side: Side, draw: random.Random) -> None:
    for p in side.params:
        if p in side.opt.state and draw.random() < 0.5:
            side.opt.state[p] = dict(side.opt.state[p])


@action(STATES)
def another_dict_of_states(side: Side, draw: random.Random) -> None:
    side.opt.state = defaultdict(dict, {p: dict(state) for p, state in side.opt.state.items()})


@action(STATES)
def state_of_one_deleted(side: Side, draw: random.Random) -> None:
    p = side.pick(draw)
    for value in side.opt.state.get(p, {}).values():
        side.replaced(value)
    side.opt.state.pop(p, None)


@action(STATES)
def state_of_one_cleared(side: Side, draw: random.Random) -> None:
    p = side.pick(draw)
    if p in side.opt.state:
        side.opt.state[p].clear()


@action(STATES)
def states_cleared(side: Side, draw: random.Random) -> None:
    for _, _, value in side.states():
        side.replaced(value)
    side.opt.state.clear()


@action(STATES)
def one_entry_deleted(side: Side, draw: random.Random) -> None:
    if found := side.pick_state(draw):
        side.replaced(found[2])
        del side.opt.state[found[0]][found[1]]


@action(STATES)
def entry_of_the_users(side: Side, draw: random.Random) -> None:
    p = side.pick(draw)
    if p in side.opt.state:
        side.opt.state[p]["mine"] = draw.choice((5, torch.zeros(3)))


@action(STATES)
def one_count_written(side: Side, draw: random.Random) -> None:
    if steps := side.counts():
        step = draw.choice(steps)
        step.fill_(draw.choice((0, 3, 100)))


@action(STATES)
def all_counts_lowered(side: Side, draw: random.Random) -> None:
    steps = side.counts()
    if all(step >= 1 for step in steps):
        for step in steps:
            step -= 1


@action(STATES)
def one_count_replaced(side: Side, draw: random.Random) -> None:
    found = [p for p in side.params if isinstance(side.opt.state.get(p, {}).get("step"), Tensor)]
    if found:
        dtype = draw.choice((torch.float32, torch.float32, torch.float64, torch.int64))
        side.opt.state[draw.choice(found)]["step"] = torch.tensor(draw.choice((0, 2, 50)), dtype=dtype)


@action(STATES)
def one_count_moved(side: Side, draw: random.Random) -> None:
    if steps := side.counts():
        step = draw.choice(steps)
        step.data = step.clone() + draw.choice((0, 1))


# Groups.


@action(GROUPS)
def replaced_parameter(side: Side, draw: random.Random) -> None:
    group = draw.choice(side.groups)
    if not group["params"]:
        return
    i = draw.randrange(len(group["params"]))
    old = group["params"][i]
    new = group["params"][i] = Parameter(side.laid(old, draw.choice(LAYOUTS)))
    side.replaced(old)
    side.spare.append(old)
    if draw.random() < 0.5 and old in side.opt.state:
        side.opt.state[new] = side.opt.state.pop(old)
    if draw.random() < 0.5 and old.grad is not None and old.grad.dtype == new.dtype:
        new.grad = old.grad


@action(GROUPS)
def added_group(side: Side, draw: random.Random) -> None:
    lr = draw.choice((0.01, 0.3))
    side.opt.add_param_group({"params": [side.new_parameter(draw) for _ in range(draw.randint(1, 3))], "lr": lr})


@action(GROUPS)
def added_group_that_is_refused(side: Side, draw: random.Random) -> None:
    side.opt.add_param_group({"params": [side.new_parameter(draw), side.pick(draw)]})


@action(GROUPS)
def appended_parameter(side: Side, draw: random.Random) -> None:
    new = side.new_parameter(draw) if not side.spare or draw.random() < 0.5 else side.spare.pop()
    params = draw.choice(side.groups)["params"]
    params.insert(draw.randint(0, len(params)), new)


@action(GROUPS)
def removed_parameter(side: Side, draw: random.Random) -> None:
    params = draw.choice(side.groups)["params"]
    if params and len(side.params) > 1:
        side.spare.append(params.pop(draw.randrange(len(params))))
        if draw.random() < 0.5:
            side.opt.state.pop(side.spare[-1], None)


@action(GROUPS)
def reordered_parameters(side: Side, draw: random.Random) -> None:
    draw.shuffle(draw.choice(side.groups)["params"])


@action(GROUPS)
def moved_to_another_group(side: Side, draw: random.Random) -> None:
    a, b = draw.choice(side.groups)["params"], draw.choice(side.groups)["params"]
    if a:
        b.append(a.pop(draw.randrange(len(a))))


@action(GROUPS)
def another_list(side: Side, draw: random.Random) -> None:
    group = draw.choice(side.groups)
    group["params"] = list(group["params"])


@action(GROUPS)
def another_dict(side: Side, draw: random.Random) -> None:
    i = draw.randrange(len(side.groups))
    side.groups[i] = dict(side.groups[i])


@action(GROUPS)
def reordered_groups(side: Side, draw: random.Random) -> None:
    draw.shuffle(side.groups)


@action(GROUPS)
def removed_group(side: Side, draw: random.Random) -> None:
    if len(side.groups) > 1:
        i = draw.randrange(len(side.groups))
        if len(side.groups[i]["params"]) < len(side.params):
            side.spare += side.groups.pop(i)["params"]


@action(GROUPS)
def another_list_of_groups(side: Side, draw: random.Random) -> None:
    side.opt.param_groups = list(side.opt.param_groups)


@action(GROUPS)
def listed_twice(side: Side, draw: random.Random) -> None:
    draw.choice(side.groups)["params"].append(side.pick(draw))


# Options.


NUMBER = (float, np.floating, Tensor)


def change(side: Side, draw: random.Random, *kinds: Callable[[float], Any]) -> None:
    """Another hyperparameter of the same range."""
    group = draw.choice(side.groups)
    name = draw.choice(sorted(n for n, v in group.items() if isinstance(v, NUMBER) and n not in STARTS))
    value = float(group[name])
    group[name] = draw.choice(kinds)(value * draw.choice((0.5, 0.9)) if value else draw.choice((0.0, 0.05)))


@action(OPTIONS)
def hyperparameter(side: Side, draw: random.Random) -> None:
    change(side, draw, float, float, torch.tensor)


@action(OPTIONS)
def hyperparameter_of_numpy(side: Side, draw: random.Random) -> None:
    kinds: list[Callable[[float], Any]] = [np.float64, np.float32, np.float16]
    if side.memory is None:  # torch would go on in the precision of the number
        kinds = [lambda value, kind=kind: float(kind(value)) for kind in kinds]
    change(side, draw, *kinds)


@action(OPTIONS)
def learning_rates(side: Side, draw: random.Random) -> None:
    factor = draw.choice((0.5, 0.9, 0.0))
    for group in side.groups:
        group["lr"] = float(group["lr"]) * factor + 0.01


@action(OPTIONS)
def learning_rate_in_place(side: Side, draw: random.Random) -> None:
    group = draw.choice(side.groups)
    if not isinstance(group["lr"], Tensor):
        group["lr"] = torch.tensor(float(group["lr"]), dtype=draw.choice((torch.float32, torch.float64)))
    else:
        group["lr"].mul_(0.5)


@action(OPTIONS)
def betas(side: Side, draw: random.Random) -> None:
    group = draw.choice(side.groups)
    if "betas" in group:
        pair = [float(beta) * draw.choice((0.5, 0.9, 1.0)) for beta in group["betas"]]
        group["betas"] = draw.choice((tuple, list))(pair)


@action(OPTIONS)
def momentum(side: Side, draw: random.Random) -> None:
    group = draw.choice(side.groups)
    if "momentum" in group:
        group["momentum"] = draw.choice((0, 0.0, 0.5, 0.9))


@action(OPTIONS)
def switch(side: Side, draw: random.Random) -> None:
    group = draw.choice(side.groups)
    names = ("maximize", "nesterov", "amsgrad", "centered")  # torch sets decoupled_weight_decay back when it loads
    name = draw.choice([n for n in names if n in group])
    group[name] = not group[name]


@action(OPTIONS)
def entry_in_a_group(side: Side, draw: random.Random) -> None:
    draw.choice(side.groups)["mine"] = draw.choice((None, "x", 3))


@action(OPTIONS)
def hook(side: Side, draw: random.Random) -> None:
    handle = side.opt.register_step_post_hook(lambda *_: None)
    if draw.random() < 0.5:
        handle.remove()


# Copies.


@action(COPIES)
def deepcopy(side: Side, draw: random.Random) -> None:
    keep_all(side)
    side.opt, side.spare = copy.deepcopy((side.opt, side.spare))


@action(COPIES)
def shallow_copy(side: Side, draw: random.Random) -> None:
    side.opt = copy.copy(side.opt)


@action(COPIES)
def pickled(side: Side, draw: random.Random) -> None:
    keep_all(side)
    side.opt, side.spare = pickle.loads(pickle.dumps((side.opt, side.spare)))


@action(COPIES)
def fresh_optimizer(side: Side, draw: random.Random) -> None:
    saved = side.opt.state_dict()
    if draw.random() < 0.5:
        saved = copy.deepcopy(saved)
    groups = [{"params": list(group["params"])} for group in side.groups]
    side.opt = side.make(groups)
    side.opt.load_state_dict(saved)


@action(COPIES)
def loaded_into_itself(side: Side, draw: random.Random) -> None:
    side.opt.load_state_dict(side.opt.state_dict())


@action(COPIES)
def saved(side: Side, draw: random.Random) -> None:
    side.saved = copy.deepcopy(side.opt.state_dict())


@action(COPIES)
def resumed(side: Side, draw: random.Random) -> None:
    if side.saved is not None:
        side.opt.load_state_dict(copy.deepcopy(side.saved))


@action(COPIES)
def saved_and_dropped(side: Side, draw: random.Random) -> None:
    side.opt.state_dict()


def keep_all(side: Side) -> None:
    """Watch all that a copy is made of: it is another's from now on."""
    for p in side.params:
        side.replaced(p)
    for _, _, value in side.states():
        side.replaced(value)
