"""The counts of steps in checkpoints: what form they have, what becomes of other forms, whom they belong to."""

import copy
import pickle

import pytest
import torch
from side_by_side import assert_same, give_grads, ours, peer, train
from state_dicts import ADAMW, through_a_file
from table import KINDS, rows, rows_and_backends

COUNTING = [case for case in KINDS if case.counts_steps]
each_counting = rows(*COUNTING)
each_counting_and_backend = rows_and_backends(*COUNTING)


@each_counting
@pytest.mark.parametrize(
    "form",
    [
        float,
        int,
        lambda step: torch.tensor(int(step)),
        lambda step: torch.tensor([float(step)]),
        lambda step: torch.tensor(float(step), dtype=torch.float64),
        lambda step: torch.tensor(float(step), dtype=torch.bfloat16),
    ],
    ids=["float", "int", "int64", "1-element", "float64", "bfloat16"],
)
def test_step_in_another_form_becomes_torchs(case, form, device):
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params), peer(case, theirs)
    train(case, range(2), (theirs, torchs))
    saved = copy.deepcopy(torchs.state_dict())
    for state in saved["state"].values():
        state["step"] = form(state["step"])
    opt.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(params, theirs, strict=True):
            p.copy_(q)
    train(case, range(2, 4), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)
    for state in opt.state_dict()["state"].values():
        assert (state["step"].dtype, state["step"].shape, state["step"].device.type) == (torch.float32, (), "cpu")


@each_counting_and_backend
def test_step_counts_on_where_bfloat16_would_stand_still(case, backend, device):
    params = case.parameters(device)
    opt = ours(case, params, backend)
    train(case, range(1), (params, opt))
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["step"] = torch.tensor(256.0, dtype=torch.bfloat16)
    opt.load_state_dict(saved)
    train(case, range(1, 3), (params, opt))
    assert {state["step"].item() for state in opt.state_dict()["state"].values()} == {258.0}


@each_counting_and_backend
def test_step_is_a_0_dim_float32_tensor_on_the_cpu(case, backend, device):
    params = case.parameters(device)
    opt = ours(case, params, backend)
    for step in range(3):
        give_grads(case, step, params, missing=(1,) if step else ())
        opt.step()
        for i, p in enumerate(params):
            count = 1 if i == 1 else step + 1
            for t in (opt.state[p]["step"], opt.state_dict()["state"][i]["step"]):
                assert isinstance(t, torch.Tensor)
                assert (t.dtype, t.shape, t.device.type, t.item()) == (torch.float32, (), "cpu", count)


@pytest.mark.gpu
@each_counting_and_backend
def test_step_is_on_the_gpu_when_capturable(case, backend, device):
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params, backend, capturable=True), peer(case, theirs, capturable=True)
    train(case, range(2), (params, opt), (theirs, torchs))
    opt.load_state_dict(through_a_file(torchs.state_dict()))
    train(case, range(2, 4), (params, opt), (theirs, torchs))
    assert {opt.state[p]["step"].device.type for p in params} == {device.type}
    assert_same(case, opt, torchs)


# Steps that share memory


def steps(saved):
    return [state["step"] for _, state in sorted(saved["state"].items(), key=lambda item: str(item[0]))]


def distinct(tensors):
    return len({t.data_ptr() for t in tensors}) == len(tensors)


@pytest.mark.parametrize(
    "passed_on",
    [
        lambda opt: opt.state_dict(),
        lambda opt: copy.deepcopy(opt.state_dict()),
        lambda opt: through_a_file(opt.state_dict()),
        lambda opt: pickle.loads(pickle.dumps(opt)).state_dict(),
        lambda opt: copy.deepcopy(opt).state_dict(),
        lambda opt: {"state": dict(copy.deepcopy(opt).state)},
        lambda opt: {"state": dict(pickle.loads(pickle.dumps(opt)).state)},
    ],
    ids=["state_dict", "deepcopied", "saved", "pickle", "deepcopy", "states of a deepcopy", "states of a pickle"],
)
@pytest.mark.parametrize("capturable", [False, True])
def test_nothing_handed_out_aliases_step(backend, passed_on, capturable, device):
    params = ADAMW.parameters(device)
    opt = ours(ADAMW, params, backend, capturable=capturable)
    train(ADAMW, range(2), (params, opt))
    counts = steps(passed_on(opt))
    assert len(counts) == len(params)
    assert distinct(counts)
    assert {t.untyped_storage().nbytes() for t in counts} == {4}
    assert all(t == 2 for t in counts)


@each_counting_and_backend
def test_torch_foreach_counts_a_loaded_step_once(case, backend, device):
    """Its foreach adds 1 to every `step` in the list: aliased ones would count each other's steps."""
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params, backend), peer(case, theirs, foreach=True)
    train(case, range(2), (params, opt))
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        group["foreach"] = True
    torchs.load_state_dict(saved)
    train(case, range(2, 3), (theirs, torchs))
    assert [t.item() for t in steps(torchs.state_dict())] == [3.0] * len(params)


@each_counting_and_backend
def test_aliased_steps_of_a_loaded_checkpoint_count_once(case, backend, device):
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params, backend), peer(case, theirs)
    train(case, range(2), (params, opt), (theirs, torchs))
    saved, shared = opt.state_dict(), torch.tensor(2.0)
    for state in saved["state"].values():
        state["step"] = shared
    opt.load_state_dict(saved)
    train(case, range(2, 4), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)
    assert distinct(steps(opt.state_dict()))
    assert shared == 2  # the checkpoint's own tensor is not counted up


@each_counting_and_backend
def test_counts_part_when_gradients_do(case, backend, device):
    """A shared count must be given up as soon as one parameter skips a step, or its state is replaced."""
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params, backend), peer(case, theirs)
    for step, missing in enumerate([(), (), (1, 3), (0,), ()]):
        give_grads(case, step, params, theirs, missing=missing)
        opt.step()
        torchs.step()
        assert [t.item() for t in steps(opt.state_dict())] == [t.item() for t in steps(torchs.state_dict())]
    assert_same(case, opt, torchs)
