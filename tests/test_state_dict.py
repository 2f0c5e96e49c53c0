"""Checkpoints: the same keys, shapes, dtypes and values as torch.optim's, in both directions, and bit for bit."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from conftest import CPP, TRITON
from side_by_side import assert_equal, assert_same, give_grads, ours, peer, train, values
from table import (
    CASES,
    KINDS,
    NUMBERS,
    each_case_and_backend,
    each_kind,
    each_kind_and_backend,
    rows,
    rows_and_backends,
)

import triton_optim as to

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BY_NAME = {case.name: case for case in CASES}
ADAMW, SGD = BY_NAME["AdamW"], BY_NAME["SGD"]
COUNTING = [case for case in KINDS if case.counts_steps]
each_counting = rows(*COUNTING)
each_counting_and_backend = rows_and_backends(*COUNTING)
each_peer_and_backend = rows_and_backends(*(case for case in CASES if case.torchs))


def newer_keys(case):
    """Keys that torch's groups did not always have: those with a flag. Checkpoints from before then lack them."""
    group = peer(case, case.parameters()).param_groups[0]
    return [name for name, value in group.items() if isinstance(value, (bool, type(None)))]


def bits(tensor):
    return tensor.detach().cpu().reshape(-1).view(torch.uint8)


def assert_bitwise(tensor, expected):
    assert tensor.dtype == expected.dtype
    assert tensor.shape == expected.shape
    assert torch.equal(bits(tensor), bits(expected))


def assert_same_states(saved, expected):
    """Two state dicts: the same parameters and keys, and the same bits."""
    assert set(saved["state"]) == set(expected["state"])
    for i, state in expected["state"].items():
        assert set(saved["state"][i]) == set(state)
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert_bitwise(saved["state"][i][key], value)
            else:
                assert saved["state"][i][key] == value


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Both ways with torch.optim


def describe(state):
    return {
        key: (v.dtype, v.shape, v.device, v.requires_grad) if isinstance(v, torch.Tensor) else type(v)
        for key, v in state.items()
    }


@each_case_and_backend
def test_state_dict_has_the_structure_of_torchs(case, backend, device):
    params, theirs = case.parameters(device), case.parameters(device)
    groups = [{"params": [0, 1]}, {"params": [2, 3], "lr": 0.5, "name": "decoder"}]
    opt, torchs = (
        make([{**group, "params": [model[i] for i in group["params"]]} for group in groups])
        for make, model in ((lambda g: ours(case, g, backend), params), (lambda g: peer(case, g), theirs))
    )
    give_grads(case, 0, params, theirs, missing=(1,))
    opt.step()
    torchs.step()
    saved, expected = opt.state_dict(), torchs.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert saved["param_groups"] == expected["param_groups"]
    assert sorted(saved["state"]) == sorted(expected["state"])
    for i, state in expected["state"].items():
        described = describe(saved["state"][i])
        assert described == describe(state)


@each_peer_and_backend
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_checkpoint_moves_in_mid_training(case, backend, direction, device):
    """One side trains, the other goes on from its checkpoint, and ends where the first does."""
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params, backend), peer(case, theirs)
    (source, first), (target, second) = (params, opt), (theirs, torchs)
    if direction == "from torch":
        (source, first), (target, second) = (target, second), (source, first)
    for group in first.param_groups:
        group["lr"] = 3e-2  # must travel
    for step in range(3):
        give_grads(case, step, source, missing=(1,) if step == 1 else ())
        first.step()
    saved = through_a_file({"model": [p.detach() for p in source], "optimizer": first.state_dict()})
    with torch.no_grad():
        for p, value in zip(target, saved["model"], strict=True):
            p.copy_(value)
    second.load_state_dict(saved["optimizer"])
    assert_same_states(second.state_dict(), first.state_dict())
    assert second.param_groups[0]["lr"] == 3e-2
    train(case, range(3, 6), (source, first), (target, second))
    assert_same(case, opt, torchs)


def test_momentum_buffer_of_none_starts_with_the_next_gradient(backend, device):
    """As SGD without momentum once saved it; with momentum (from the checkpoint's group) the buffer starts there."""
    params, theirs = SGD.parameters(device), SGD.parameters(device)
    opt, torchs = ours(SGD, params, backend), peer(SGD, theirs)
    saved = torchs.state_dict()
    saved["state"] = {i: {"momentum_buffer": None} for i in range(len(params))}
    for optimizer in (opt, torchs):
        optimizer.load_state_dict(copy.deepcopy(saved))
    train(SGD, range(3), (params, opt), (theirs, torchs))
    assert_same(SGD, opt, torchs)


def test_sgd_without_momentum_keeps_what_torchs_keeps(backend, device):
    params, theirs = SGD.parameters(device), SGD.parameters(device)
    opt, torchs = ours(SGD, params, backend, momentum=0.0), peer(SGD, theirs, momentum=0.0)
    train(SGD, range(2), (params, opt), (theirs, torchs))
    assert_same(SGD, opt, torchs)
    assert opt.state_dict()["state"] == torchs.state_dict()["state"]
    opt.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(opt.state_dict())
    train(SGD, range(2, 4), (params, opt), (theirs, torchs))
    assert_same(SGD, opt, torchs)


@pytest.mark.parametrize(("saver", "loader"), [("Adam", "AdamW"), ("AdamW", "Adam")])
def test_adam_and_adamw_read_each_others_checkpoints_as_torchs_do(saver, loader, device):
    """AdamW stays decoupled; Adam becomes what the checkpoint's group says."""
    case, saver = BY_NAME[loader], BY_NAME[saver]
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params), peer(case, theirs)
    source = case.parameters(device)
    first = ours(saver, source)
    train(case, range(2), (source, first))
    for optimizer in (opt, torchs):
        optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
    assert opt.param_groups[0]["decoupled_weight_decay"] == torchs.param_groups[0]["decoupled_weight_decay"] is True
    train(case, range(2, 4), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)


# To ourselves


@each_case_and_backend
def test_reload_inside_the_loop_changes_nothing(case, backend, device):
    """Saved and loaded at every step, by the same optimizer and by a new one: the uninterrupted run, bit for bit."""
    params, reloaded, renewed = case.parameters(device), case.parameters(device), case.parameters(device)
    opt, same, new = ours(case, params, backend), ours(case, reloaded, backend), ours(case, renewed, backend)
    for step in range(4):
        train(case, [step], (params, opt), (reloaded, same), (renewed, new))
        same.load_state_dict(same.state_dict())
        saved = through_a_file(new.state_dict())
        new = ours(case, renewed, backend)
        new.load_state_dict(saved)
        assert_same_states(new.state_dict(), opt.state_dict())
    assert_same(case, same, opt, rtol=0, atol=0)
    assert_same(case, new, opt, rtol=0, atol=0)


@each_kind_and_backend
def test_rewind(case, backend, device):
    """An earlier state loaded into an optimizer that has gone on: what its plans cached must be dropped."""
    params = case.parameters(device)
    opt = ours(case, params, backend)
    train(case, range(2), (params, opt))
    start, saved = values(params), copy.deepcopy(opt.state_dict())
    train(case, range(2, 4), (params, opt))
    end, after = values(params), copy.deepcopy(opt.state_dict())
    with torch.no_grad():
        for p, value in zip(params, start, strict=True):
            p.copy_(value)
    opt.load_state_dict(saved)
    assert_same_states(opt.state_dict(), saved)
    train(case, range(2, 4), (params, opt))
    assert_equal(params, end)
    assert_same_states(opt.state_dict(), after)


@each_kind_and_backend
@pytest.mark.parametrize("direction", ["from eager", "to eager"])
def test_checkpoint_moves_between_backends(case, backend, direction, device):
    first, second = ("eager", backend) if direction == "from eager" else (backend, "eager")
    source, target = case.parameters(device), case.parameters(device)
    opt, other = ours(case, source, first), ours(case, target, second)
    train(case, range(2), (source, opt))
    with torch.no_grad():
        for p, q in zip(target, source, strict=True):
            p.copy_(q)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert other.backend == second  # the choice is the optimizer's, not the checkpoint's
    train(case, range(2, 4), (source, opt), (target, other))
    assert_same(case, other, opt)


@each_kind_and_backend
def test_pinned_backend_survives_a_checkpoint_that_asks_for_another(case, backend, device):
    """torch's own groups carry foreach and fused. They do not unpin ours."""
    params, theirs = case.parameters(device), case.parameters(device)
    opt = ours(case, params, backend)
    torchs = peer(case, theirs, foreach=False, fused=False)
    train(case, range(1), (theirs, torchs))
    opt.load_state_dict(torchs.state_dict())
    train(case, range(1, 2), (params, opt))
    assert opt.backend == backend
    assert {bucket.backend for bucket in to.explain(opt) if bucket.elements} == {backend}


@each_kind
def test_loading_copies_groups_and_leaves_the_dict_alone(case, device):
    params, fresh = case.parameters(device), case.parameters(device)
    opt, other = ours(case, params), ours(case, fresh)
    train(case, range(1), (params, opt))
    saved = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    assert saved["param_groups"] == kept["param_groups"]
    assert_same_states(saved, kept)
    saved["param_groups"][0]["lr"] = 123.0
    saved["state"].clear()
    assert other.param_groups[0]["lr"] == case.settings["lr"]
    assert_same_states(other.state_dict(), kept)


@each_kind
def test_group_keys_of_the_users_own_travel(case, device):
    params = case.parameters(device)
    opt = ours(case, [{"params": params[:2], "name": "encoder"}, {"params": params[2:], "name": "decoder", "rank": 4}])
    torchs = peer(case, [{"params": case.parameters(device)[:2]}, {"params": case.parameters(device)[2:]}])
    torchs.load_state_dict(opt.state_dict())
    other = ours(case, [{"params": case.parameters(device)[:2]}, {"params": case.parameters(device)[2:]}])
    other.load_state_dict(torchs.state_dict())
    assert [group["name"] for group in other.param_groups] == ["encoder", "decoder"]
    assert other.param_groups[1]["rank"] == 4


@each_kind
def test_parameters_without_state_stay_without(case, device):
    params, fresh = case.parameters(device), case.parameters(device)
    opt, other = ours(case, params), ours(case, fresh)
    start = len(other.state)  # Adagrad's states exist before the first step
    give_grads(case, 0, params, missing=(0, 2))
    opt.step()
    other.load_state_dict(opt.state_dict())
    assert sorted(other.state_dict()["state"]) == ([0, 1, 2, 3] if start else [1, 3])


@each_kind_and_backend
def test_layout_of_the_state_survives(case, backend, device):
    """Channels-last moments read as contiguous would be moments of other elements."""

    def laid_out():
        (p,) = case.parameters(device, shapes=((4, 3) if case.matrices else (2, 3, 4, 5),))
        p.data = p.data.t().contiguous().t() if case.matrices else p.data.to(memory_format=torch.channels_last)
        return [p]

    params, resumed, theirs = laid_out(), laid_out(), laid_out()
    opt, other, torchs = ours(case, params, backend), ours(case, resumed, backend), peer(case, theirs)
    train(case, range(2), (params, opt), (theirs, torchs))
    other.load_state_dict(through_a_file(opt.state_dict()))
    strides = [
        {key: v.stride() for key, v in o.state_dict()["state"][0].items() if key not in NUMBERS} for o in (opt, other)
    ]
    assert strides[0] == strides[1]
    resumed[0].data = params[0].data.clone()
    train(case, range(2, 4), (params, opt), (resumed, other), (theirs, torchs))
    assert_same(case, other, opt, rtol=0, atol=0)
    assert_same(case, opt, torchs)


# Dtypes


def awkward(shape, dtype, seed):
    """Random values with the ones among them that casts lose or canonicalise."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1 / 3, torch.finfo(dtype).tiny, torch.finfo(dtype).max]
    flat = tensor.reshape(-1)
    flat[: len(special)] = torch.tensor(special, dtype=torch.float64).to(dtype)[: flat.numel()]
    return tensor


@each_kind
@pytest.mark.parametrize("p_dtype", DTYPES)
@pytest.mark.parametrize("s_dtype", DTYPES)
def test_every_state_is_restored_in_its_own_dtype_bit_for_bit(case, p_dtype, s_dtype, device):
    params = case.parameters(device, p_dtype)
    opt = ours(case, params, "eager")
    train(case, range(1), (params, opt))
    for i, p in enumerate(params):
        for key, value in opt.state[p].items():
            if key not in NUMBERS:
                opt.state[p][key] = awkward(value.shape, s_dtype, seed=i).to(device)
    saved = copy.deepcopy(opt.state_dict())
    assert {v.dtype for s in saved["state"].values() for key, v in s.items() if key not in NUMBERS} == {s_dtype}
    for reload in (lambda: saved, lambda: through_a_file(saved)):
        other = ours(case, case.parameters(device, p_dtype), "eager")
        other.load_state_dict(reload())
        assert_same_states(other.state_dict(), saved)


@each_kind
@pytest.mark.parametrize("p_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.bool])
def test_codes_of_a_state_stay_integers(case, p_dtype, dtype, device):
    """Whatever else a state holds, the quantized codes and scales of a codec say."""
    params = case.parameters(device, p_dtype)
    opt = ours(case, params, "eager")
    train(case, range(1), (params, opt))
    for i, p in enumerate(params):
        opt.state[p]["codes"] = torch.randint(0, 2, (7,), generator=torch.Generator().manual_seed(i)).to(device, dtype)
    saved = copy.deepcopy(opt.state_dict())
    other = ours(case, case.parameters(device, p_dtype), "eager")
    other.load_state_dict(saved)
    assert_same_states(other.state_dict(), saved)


DTYPE_PAIRS = list(itertools.product(DTYPES, DTYPES))
MIXED = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.bfloat16)]
HALVES = [pair for pair in DTYPE_PAIRS if pair[0] != pair[1] and pair[1].itemsize == 2]
# The interpreter is slow, and a compilation takes seconds: the conversions are the same for every rule.
RESUMED = [
    pytest.param(case, pinned, *pair, marks=marks, id="-".join([case.name, pinned, *(str(d)[6:] for d in pair)]))
    for case in KINDS
    for pinned, pairs, marks in (
        ("eager", DTYPE_PAIRS if case.on_every_backend else MIXED, ()),
        ("triton", HALVES + MIXED[:1] if case is ADAMW else MIXED if case.on_every_backend else [], TRITON),
        ("compiled", MIXED[:1] if case is ADAMW else [], ()),
        ("cpp", MIXED if case is ADAMW else [], CPP),
    )
    for pair in pairs
]


@pytest.mark.parametrize(("case", "pinned", "p_dtype", "s_dtype"), RESUMED)
def test_training_resumes_bit_for_bit_with_states_of_another_dtype(case, pinned, p_dtype, s_dtype, device):
    params, eager = case.parameters(device, p_dtype), case.parameters(device, p_dtype)
    opt, reference = ours(case, params, pinned), ours(case, eager, "eager")
    train(case, range(1), (params, opt), (eager, reference))
    for optimizer, model in ((opt, params), (reference, eager)):
        for p in model:
            for key, value in optimizer.state[p].items():
                if key not in NUMBERS:
                    optimizer.state[p][key] = value.to(s_dtype)
    train(case, range(1, 2), (params, opt), (eager, reference))
    resumed = [torch.nn.Parameter(value) for value in values(params)]
    other = ours(case, resumed, pinned)
    other.load_state_dict(through_a_file(opt.state_dict()))
    train(case, range(2, 4), (params, opt), (resumed, other), (eager, reference))
    for p, q in zip(params, resumed, strict=True):
        assert_bitwise(q, p)
    saved = opt.state_dict()
    assert_same_states(other.state_dict(), saved)
    assert {v.dtype for s in saved["state"].values() for key, v in s.items() if key not in NUMBERS} == {s_dtype}
    # Nor are they bit for bit the same nonsense: a few roundings, of values of order 1, from the eager backend.
    rounding = 4 * max(torch.finfo(p_dtype).eps, torch.finfo(s_dtype).eps)
    assert_same(case, opt, reference, rtol=rounding, atol=rounding)


# Old and foreign forms of what we keep


@each_kind_and_backend
def test_checkpoint_without_the_newer_group_keys(case, backend, device):
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params, backend), peer(case, theirs)
    train(case, range(2), (params, opt), (theirs, torchs))
    old = copy.deepcopy(torchs.state_dict())
    for key in newer_keys(case):
        del old["param_groups"][0][key]
    opt.load_state_dict(old)
    group, expected = opt.param_groups[0], torchs.param_groups[0]
    assert set(group) == set(expected)
    # torch fills SGD's fused with False. Off is off.
    assert {key: group[key] or None for key in newer_keys(case)} == {
        key: expected[key] or None for key in newer_keys(case)
    }
    train(case, range(2, 4), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)


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
def test_nothing_handed_out_aliases_step(backend, passed_on, device):
    params = ADAMW.parameters(device)
    opt = ours(ADAMW, params, backend)
    train(ADAMW, range(2), (params, opt))
    counts = steps(passed_on(opt))
    assert len(counts) == len(params)
    assert distinct(counts)
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


# torch.distributed.checkpoint


@pytest.fixture(scope="module")
def dcp():
    if not torch.distributed.is_available():
        pytest.skip("this torch was built without torch.distributed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch's own imports
        import torch.distributed.checkpoint.state_dict as module
    return module


# It makes dense gradients.
each_dense_and_backend = rows_and_backends(*(case for case in KINDS if not case.sparse))


def model(case, device):
    torch.manual_seed(0)
    sizes, bias = ((3, 4), (4, 2)), not case.matrices
    return torch.nn.Sequential(*(torch.nn.Linear(*size, bias=bias) for size in sizes)).to(device)


@each_dense_and_backend
@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float lr", "tensor lr"])
def test_distributed_checkpoint_leaves_a_fresh_optimizer_fresh(case, backend, lr, dcp, device):
    """It steps a fresh optimizer with gradients of zero and lr 0, to see what states there are."""
    net, theirs, untouched = model(case, device), model(case, device), model(case, device)
    opt, torchs = ours(case, net.parameters(), backend, lr=lr), peer(case, theirs.parameters(), lr=lr)
    before, random = values(net.parameters()), torch.get_rng_state()
    saved, expected = (dcp.get_optimizer_state_dict(m, o) for m, o in ((net, opt), (theirs, torchs)))
    assert_equal(net.parameters(), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in net.parameters())
    assert opt.param_groups[0]["lr"] is lr
    assert {key: set(state) for key, state in saved["state"].items()} == {
        key: set(state) for key, state in expected["state"].items()
    }
    for state in opt.state_dict()["state"].values():
        assert not any(value.any() for key, value in state.items() if key not in (*NUMBERS, "step_size", "z"))
    # What matters: it trains as if nobody had looked.
    other = ours(case, untouched.parameters(), backend, lr=lr)
    train(case, range(3), (list(net.parameters()), opt), (list(untouched.parameters()), other))
    assert_same(case, opt, other, rtol=0, atol=0)


@each_dense_and_backend
def test_distributed_checkpoint_resumes(case, backend, dcp, device):
    net, resumed = model(case, device), model(case, device)
    opt, other = ours(case, net.parameters(), backend), ours(case, resumed.parameters(), backend)
    train(case, range(2), (list(net.parameters()), opt))
    saved = through_a_file(dcp.get_optimizer_state_dict(net, opt))
    resumed.load_state_dict(net.state_dict())
    dcp.set_optimizer_state_dict(resumed, other, saved)
    assert_same_states(other.state_dict(), opt.state_dict())
    train(case, range(2, 4), (list(net.parameters()), opt), (list(resumed.parameters()), other))
    assert_same(case, other, opt, rtol=0, atol=0)
