"""What a user may do to groups, options and the whole optimizer between steps: see user_actions.py."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from user_sides import LAYOUTS, STARTS, Action, Side, action

GROUPS: dict[str, Action] = {}
OPTIONS: dict[str, Action] = {}
COPIES: dict[str, Action] = {}


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
def whole_number(side: Side, draw: random.Random) -> None:
    group = draw.choice(side.groups)
    if names := sorted(n for n, v in group.items() if type(v) is int and v >= 1):
        name = draw.choice(names)
        group[name] = max(1, group[name] + draw.choice((-1, 1, 2)))


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
