"""What a user may do to an optimizer's parameter groups and states between two steps, tried beside torch's for-loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

SHAPES = ((3, 4), (4, 3), (4, 5), (5, 2), (3, 3), (4, 3))  # the last parameter is in no group at first


def take_the_first(opt: Any, spare: Parameter) -> None:
    opt.param_groups[0]["params"].pop(0)


def swap(opt: Any, spare: Parameter) -> None:
    params = opt.param_groups[0]["params"]
    params[0], params[1] = params[1], params[0]


def move_to_the_next_group(opt: Any, spare: Parameter) -> None:
    """All parameters are in the order in which they were."""
    opt.param_groups[1]["params"].insert(0, opt.param_groups[0]["params"].pop())


def append(opt: Any, spare: Parameter) -> None:
    opt.param_groups[1]["params"].append(spare)


def replace(opt: Any, spare: Parameter) -> None:
    opt.param_groups[0]["params"][1] = spare


def replace_with_its_state(opt: Any, spare: Parameter) -> None:
    old, opt.param_groups[0]["params"][1] = opt.param_groups[0]["params"][1], spare
    opt.state[spare] = opt.state.pop(old)


def another_list(opt: Any, spare: Parameter) -> None:
    opt.param_groups[0]["params"] = opt.param_groups[0]["params"][::-1]


def a_tuple(opt: Any, spare: Parameter) -> None:
    opt.param_groups[0]["params"] = tuple(opt.param_groups[0]["params"][1:])


def empty_a_group(opt: Any, spare: Parameter) -> None:
    opt.param_groups[0]["params"].clear()


def take_the_first_group(opt: Any, spare: Parameter) -> None:
    opt.param_groups.pop(0)


def take_the_last_group(opt: Any, spare: Parameter) -> None:
    opt.param_groups.pop(1)


def take_all_groups(opt: Any, spare: Parameter) -> None:
    opt.param_groups.clear()


def turn_the_groups_round(opt: Any, spare: Parameter) -> None:
    opt.param_groups.reverse()


def another_list_of_groups(opt: Any, spare: Parameter) -> None:
    opt.param_groups = [dict(group) for group in reversed(opt.param_groups)]


def split_a_group(opt: Any, spare: Parameter) -> None:
    """All parameters are in the order in which they were."""
    first = opt.param_groups[0]
    parts = first["params"][:1], first["params"][1:]
    opt.param_groups[:1] = [{**first, "params": parts[0]}, {**first, "params": parts[1], "lr": 0.7}]


def append_a_group(opt: Any, spare: Parameter) -> None:
    opt.param_groups.append({**opt.param_groups[0], "params": [spare], "lr": 0.03})


def add_a_group(opt: Any, spare: Parameter) -> None:
    opt.add_param_group({"params": [spare], "lr": 0.03})


def list_one_twice(opt: Any, spare: Parameter) -> None:
    opt.param_groups[0]["params"].append(opt.param_groups[0]["params"][0])


def list_one_in_two_groups(opt: Any, spare: Parameter) -> None:
    opt.param_groups[1]["params"].append(opt.param_groups[0]["params"][0])


GROUPS = [
    take_the_first,
    swap,
    move_to_the_next_group,
    append,
    replace,
    replace_with_its_state,
    another_list,
    a_tuple,
    empty_a_group,
    take_the_first_group,
    take_the_last_group,
    take_all_groups,
    turn_the_groups_round,
    another_list_of_groups,
    split_a_group,
    append_a_group,
    add_a_group,
]
TWICE = [list_one_twice, list_one_in_two_groups]


def first(opt: Any) -> Parameter:
    return opt.param_groups[0]["params"][0]


def clear_all_states(opt: Any, spare: Parameter) -> None:
    opt.state.clear()


def another_dict_of_states(opt: Any, spare: Parameter) -> None:
    opt.state = type(opt.state)(opt.state.default_factory)


def clear_a_state(opt: Any, spare: Parameter) -> None:
    opt.state[first(opt)].clear()


def drop_a_state(opt: Any, spare: Parameter) -> None:
    del opt.state[first(opt)]


def another_state(opt: Any, spare: Parameter) -> None:
    opt.state[first(opt)] = {name: 2 * value for name, value in opt.state[first(opt)].items()}


def another_moment(opt: Any, spare: Parameter) -> None:
    opt.state[first(opt)]["exp_avg"] = torch.full_like(first(opt), 0.25)


def another_count(opt: Any, spare: Parameter) -> None:
    opt.state[first(opt)]["step"] = torch.tensor(7.0)


STATES = [
    clear_all_states,
    another_dict_of_states,
    clear_a_state,
    drop_a_state,
    another_state,
    another_moment,
    another_count,
]


def trained(cls: Any, edit: Any, device: Any, step: Callable[[Any], Any] = lambda opt: opt.step, **options: Any) -> Any:
    """All parameters, and the optimizer of five of them, after two steps, an edit, and two more steps.

    Args:
        cls: the optimizer.
        edit: of the above.
        device: where the parameters lie.
        step: what makes a step, from the optimizer.
        options: of the optimizer.
    """
    random = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=random).to(device)) for shape in SHAPES]
    opt = cls([{"params": params[:3]}, {"params": params[3:5], "lr": 0.02}], lr=0.1, **options)
    run = step(opt)
    for k in range(4):
        if k == 2:
            edit(opt, params[5])
        for p in params:
            p.grad = None
        sum((p * torch.randn(p.shape, generator=random).to(device)).sum() for p in params).backward()
        run()
    return params, opt


def assert_as_torch(ours: Any, theirs: Any) -> None:
    """Equal parameters and states, of :func:`trained`."""
    close = {"rtol": 1e-4, "atol": 1e-5}
    for i, (p, q) in enumerate(zip(ours[0], theirs[0], strict=True)):
        torch.testing.assert_close(p, q, **close, msg=lambda m, i=i: f"parameter {i}: {m}")
        states = [ours[1].state.get(p, {}), theirs[1].state.get(q, {})]
        own, other = ({name: torch.as_tensor(value) for name, value in state.items()} for state in states)
        torch.testing.assert_close(own, other, **close, msg=lambda m, i=i: f"state of parameter {i}: {m}")
