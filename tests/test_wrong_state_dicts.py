"""State dicts that do not fit: the exception type that torch raises, a message with the fix, and nothing changed."""

import copy

import pytest
import torch
from complaints import Unchanged, explains, raised_by
from side_by_side import assert_same, give_grads, ours, train
from table import CASES, KINDS, each_case, each_kind, each_kind_and_backend, rows

ADAMW = next(case for case in CASES if case.name == "AdamW")


def torchs(case):
    return case.torchs or torch.optim.AdamW


def without(key):
    def edit(saved):
        del saved[key]
        return saved

    return edit


def regrouped(saved):
    (group,) = saved["param_groups"]
    first, second = {**group, "params": group["params"][:2]}, {**group, "params": group["params"][2:]}
    return {**saved, "param_groups": [first, second]}


def shortened(saved):
    saved["param_groups"][0]["params"].pop()
    return saved


def lacking(key):
    def edit(saved):
        del saved["param_groups"][0][key]
        return saved

    return edit


FOREIGN = {
    "nothing": lambda saved: {},
    "None": lambda saved: None,
    "a list": lambda saved: [saved],
    "without param_groups": without("param_groups"),
    "without state": without("state"),
    "more groups": regrouped,
    "fewer parameters": shortened,
    "no groups": lambda saved: {**saved, "param_groups": []},
}


def load_and_step(opt, saved):
    """torch finds some faults only when it steps."""
    opt.load_state_dict(saved)
    opt.step()


@each_kind
@pytest.mark.parametrize("fault", list(FOREIGN))
def test_foreign_state_dict(case, fault, device):
    def build(make):
        params = case.parameters(device)
        opt = make(params)
        train(case, range(2), (params, opt))
        return opt, FOREIGN[fault](copy.deepcopy(opt.state_dict()))

    expected = raised_by(lambda: load_and_step(*build(torchs(case))))
    opt, saved = build(lambda params: ours(case, params))
    with pytest.raises((expected, TypeError)), Unchanged(opt):  # of what is no dict torch lacks some attribute
        opt.load_state_dict(saved)
    opt.step()


@each_case
def test_state_dict_that_lacks_a_hyperparameter(case, device):
    """Of those that torch misses too: Rprop's lr is for the first step alone."""
    missed = 0
    for name in (name for name, value in case.settings.items() if not isinstance(value, bool)):

        def build(make, name=name):
            params = case.parameters(device)
            opt = make(params)
            give_grads(case, 0, params)
            return opt, lacking(name)(copy.deepcopy(opt.state_dict()))

        try:
            load_and_step(*build(torchs(case)))
        except Exception as error:
            expected = type(error)
        else:
            continue
        opt, saved = build(lambda params: ours(case, params))
        with pytest.raises(expected) as error, Unchanged(opt):
            opt.load_state_dict(saved)
        explains(error, name)
        missed += 1
    assert missed or case.name == "Rprop"


@rows(*(case for case in CASES if case.torchs))
def test_state_dict_of_another_optimizer(case, device):
    """Of every other one: what torch refuses or stumbles over in the next step, is refused when it is loaded."""
    refused = 0
    for saver in KINDS:
        if saver is case or saver.shapes != case.shapes:
            continue
        source = saver.parameters(device)
        first = ours(saver, source)
        train(saver, range(2), (source, first))
        saved = first.state_dict()

        def build(make):
            params = case.parameters(device)
            opt = make(params)
            train(case, range(1), (params, opt))
            return opt

        try:
            load_and_step(build(case.torchs), copy.deepcopy(saved))
        except Exception as error:
            expected = type(error)
        else:
            continue
        opt = build(lambda params: ours(case, params))
        with pytest.raises((expected, ValueError)) as error, Unchanged(opt):
            opt.load_state_dict(copy.deepcopy(saved))
        explains(error, case.name)
        refused += 1
    assert refused or case.shapes != ADAMW.shapes  # of those that take other parameters there may be no other


@each_kind_and_backend
def test_state_of_another_shape(case, backend, device):
    """The same number of parameters, of another model. A kernel would read past the end of these states."""
    source = case.parameters(device, shapes=((4, 2), *case.shapes[1:]))
    first = ours(case, source)
    train(case, range(2), (source, first))
    saved = first.state_dict()
    params = case.parameters(device)
    give_grads(case, 0, params)
    opt = ours(case, params, backend)
    with pytest.raises(RuntimeError) as error, Unchanged(opt):  # as torch, when sizes meet that do not fit
        load_and_step(opt, saved)
    explains(error, "parameter 0", *(("4, 2", "4, 3") if case.elementwise else ()))


@each_kind_and_backend
def test_state_of_another_shape_put_there_by_hand(case, backend, device):
    params = case.parameters(device)
    opt = ours(case, params, backend)
    train(case, range(1), (params, opt))
    for name in opt.state[params[0]].keys() - case.numbers.keys():
        right = opt.state[params[0]][name]
        opt.state[params[0]][name] = torch.zeros(4, 2, device=device)
        give_grads(case, 1, params)
        with pytest.raises(RuntimeError) as error, Unchanged(opt):
            opt.step()
        explains(error, name, "parameter 0", "4, 2")
        opt.state[params[0]][name] = right


@each_kind
def test_failed_load_leaves_an_optimizer_that_trains_on(case, device):
    """Side by side with one that was never asked to load anything."""
    params, theirs = case.parameters(device), case.parameters(device)
    opt, other = ours(case, params), ours(case, theirs)
    train(case, range(2), (params, opt), (theirs, other))
    with pytest.raises(ValueError, match="parameter group"):
        opt.load_state_dict(shortened(copy.deepcopy(opt.state_dict())))
    train(case, range(2, 4), (params, opt), (theirs, other))
    assert_same(case, opt, other, rtol=0, atol=0)
