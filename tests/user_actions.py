"""What Python lets a user do to an optimizer between steps, as actions on a side: ours, or torch's beside it.

Here are those on gradients, parameters and states; the others are in user_actions_on_groups.py.

An action draws all that it chooses from a random.Random. Both sides are alike and get one of the same seed, so that the
same happens to both.
"""

from __future__ import annotations

import math
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

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
        """Every state that has elements, with its parameter and name; those of a parameter in the order of their names,
        which is that of both sides.
        """
        for p in self.params:
            for name, value in sorted(self.opt.state.get(p, {}).items()):
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
