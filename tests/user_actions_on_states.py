"""What a user may do to states between steps: see user_actions.py."""

from __future__ import annotations

import random
from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import Parameter
from user_sides import (
    LAYOUTS,
    Action,
    Side,
    action,
    resizable,
    two_alike,
)

STATES: dict[str, Action] = {}


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
            if name in theirs and name not in side.counted and isinstance(own[name], Tensor):
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
