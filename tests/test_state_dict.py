"""Checkpoints: the same keys, shapes, dtypes and values as torch.optim's, in both directions, and bit for bit."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from test_contract import (
    PEERS,
    SETTINGS,
    TRITON,
    assert_equal,
    assert_same,
    each_optimizer,
    give_grads,
    leaves,
    ours,
    peer,
    train,
    values,
)

import triton_optim as to

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Keys that torch's groups did not always have. Checkpoints from before then lack them.
NEWER_KEYS = {
    "AdamW": ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"),
    "Adam": ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"),
    "SGD": ("nesterov", "maximize", "foreach", "differentiable", "fused"),
    "Lion": ("maximize", "foreach", "capturable", "differentiable", "fused"),
}

torch_peers = pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
counting = pytest.mark.parametrize("name", ["AdamW", "Adam"])


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
            assert_bitwise(saved["state"][i][key], value)


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Both ways with torch.optim


@each_optimizer
def test_state_dict_has_the_structure_of_torchs(name, backend, device):
    params, theirs = leaves(device), leaves(device)
    groups = [{"params": [0, 1]}, {"params": [2, 3], "lr": 0.5, "name": "decoder"}]
    opt, torchs = (
        make([{**group, "params": [model[i] for i in group["params"]]} for group in groups])
        for make, model in ((lambda g: ours(name, g, backend), params), (lambda g: peer(name, g), theirs))
    )
    give_grads(0, params, theirs, missing=(1,))
    opt.step()
    torchs.step()
    saved, expected = opt.state_dict(), torchs.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert saved["param_groups"] == expected["param_groups"]
    assert sorted(saved["state"]) == sorted(expected["state"]) == [0, 2, 3]
    for i, state in expected["state"].items():
        described = {key: (v.dtype, v.shape, v.device, v.requires_grad) for key, v in saved["state"][i].items()}
        assert described == {key: (v.dtype, v.shape, v.device, v.requires_grad) for key, v in state.items()}


@torch_peers
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_checkpoint_moves_in_mid_training(name, backend, direction, device):
    """One side trains, the other goes on from its checkpoint, and ends where the first does."""
    params, theirs = leaves(device), leaves(device)
    opt, torchs = ours(name, params, backend), peer(name, theirs)
    (source, first), (target, second) = (params, opt), (theirs, torchs)
    if direction == "from torch":
        (source, first), (target, second) = (target, second), (source, first)
    for group in first.param_groups:
        group["lr"] = 3e-2  # must travel
    for step in range(3):
        give_grads(step, source, missing=(1,) if step == 1 else ())
        first.step()
    saved = through_a_file({"model": [p.detach() for p in source], "optimizer": first.state_dict()})
    with torch.no_grad():
        for p, value in zip(target, saved["model"], strict=True):
            p.copy_(value)
    second.load_state_dict(saved["optimizer"])
    assert_same_states(second.state_dict(), first.state_dict())
    assert second.param_groups[0]["lr"] == 3e-2
    train(range(3, 6), (source, first), (target, second))
    assert_same(opt, torchs)


@torch_peers
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_checkpoint_moves_with_optional_states(name, backend, direction, device):
    option = {"nesterov": True} if name == "SGD" else {"amsgrad": True}
    params, theirs = leaves(device), leaves(device)
    opt, torchs = ours(name, params, backend, **option), peer(name, theirs, **option)
    train(range(3), (params, opt), (theirs, torchs))
    first, second = (torchs, opt) if direction == "from torch" else (opt, torchs)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert_same_states(second.state_dict(), first.state_dict())
    train(range(3, 6), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)


def test_momentum_buffer_of_none_starts_with_the_next_gradient(backend, device):
    """As SGD without momentum once saved it; with momentum (from the checkpoint's group) the buffer starts there."""
    params, theirs = leaves(device), leaves(device)
    opt, torchs = ours("SGD", params, backend), peer("SGD", theirs)
    saved = torchs.state_dict()
    saved["state"] = {i: {"momentum_buffer": None} for i in range(len(params))}
    for optimizer in (opt, torchs):
        optimizer.load_state_dict(copy.deepcopy(saved))
    train(range(3), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)


def test_sgd_without_momentum_keeps_what_torchs_keeps(backend, device):
    params, theirs = leaves(device), leaves(device)
    opt, torchs = ours("SGD", params, backend, momentum=0.0), peer("SGD", theirs, momentum=0.0)
    train(range(2), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)
    assert opt.state_dict()["state"] == torchs.state_dict()["state"]
    opt.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(opt.state_dict())
    train(range(2, 4), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)


@pytest.mark.parametrize(("saver", "loader"), [("Adam", "AdamW"), ("AdamW", "Adam")])
def test_adam_and_adamw_read_each_others_checkpoints_as_torchs_do(saver, loader, device):
    """AdamW stays decoupled; Adam becomes what the checkpoint's group says."""
    params, theirs = leaves(device), leaves(device)
    opt, torchs = ours(loader, params), peer(loader, theirs)
    source = leaves(device)
    first = ours(saver, source)
    train(range(2), (source, first))
    for optimizer in (opt, torchs):
        optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
    assert opt.param_groups[0]["decoupled_weight_decay"] == torchs.param_groups[0]["decoupled_weight_decay"] is True
    train(range(2, 4), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)


# To ourselves


@each_optimizer
def test_reload_inside_the_loop_changes_nothing(name, backend, device):
    """Saved and loaded at every step, by the same optimizer and by a new one: the uninterrupted run, bit for bit."""
    params, reloaded, renewed = leaves(device), leaves(device), leaves(device)
    opt, same, new = ours(name, params, backend), ours(name, reloaded, backend), ours(name, renewed, backend)
    for step in range(4):
        train([step], (params, opt), (reloaded, same), (renewed, new))
        same.load_state_dict(same.state_dict())
        saved = through_a_file(new.state_dict())
        new = ours(name, renewed, backend)
        new.load_state_dict(saved)
        assert_same_states(new.state_dict(), opt.state_dict())
    assert_same(same, opt, rtol=0, atol=0)
    assert_same(new, opt, rtol=0, atol=0)


@each_optimizer
def test_rewind(name, backend, device):
    """An earlier state loaded into an optimizer that has gone on: what its plans cached must be dropped."""
    params = leaves(device)
    opt = ours(name, params, backend)
    train(range(2), (params, opt))
    start, saved = values(params), copy.deepcopy(opt.state_dict())
    train(range(2, 4), (params, opt))
    end, after = values(params), copy.deepcopy(opt.state_dict())
    with torch.no_grad():
        for p, value in zip(params, start, strict=True):
            p.copy_(value)
    opt.load_state_dict(saved)
    assert_same_states(opt.state_dict(), saved)
    train(range(2, 4), (params, opt))
    assert_equal(params, end)
    assert_same_states(opt.state_dict(), after)


@each_optimizer
@pytest.mark.parametrize("direction", ["from eager", "to eager"])
def test_checkpoint_moves_between_backends(name, backend, direction, device):
    first, second = ("eager", backend) if direction == "from eager" else (backend, "eager")
    source, target = leaves(device), leaves(device)
    opt, other = ours(name, source, first), ours(name, target, second)
    train(range(2), (source, opt))
    with torch.no_grad():
        for p, q in zip(target, source, strict=True):
            p.copy_(q)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert other.backend == second  # the choice is the optimizer's, not the checkpoint's
    train(range(2, 4), (source, opt), (target, other))
    assert_same(other, opt)


@each_optimizer
def test_pinned_backend_survives_a_checkpoint_that_asks_for_another(name, backend, device):
    """torch's own groups carry foreach and fused. They do not unpin ours."""
    params, theirs = leaves(device), leaves(device)
    opt = ours(name, params, backend)
    torchs = peer(name, theirs, foreach=False, fused=False)
    train(range(1), (theirs, torchs))
    opt.load_state_dict(torchs.state_dict())
    train(range(1, 2), (params, opt))
    assert opt.backend == backend
    assert {bucket.backend for bucket in to.explain(opt) if bucket.elements} == {backend}


@each_optimizer
def test_loading_copies_groups_and_leaves_the_dict_alone(name, device):
    params, fresh = leaves(device), leaves(device)
    opt, other = ours(name, params), ours(name, fresh)
    train(range(1), (params, opt))
    saved = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    assert saved["param_groups"] == kept["param_groups"]
    assert_same_states(saved, kept)
    saved["param_groups"][0]["lr"] = 123.0
    saved["state"].clear()
    assert other.param_groups[0]["lr"] == SETTINGS[name]["lr"]
    assert_same_states(other.state_dict(), kept)


@each_optimizer
def test_group_keys_of_the_users_own_travel(name, device):
    params = leaves(device)
    opt = ours(name, [{"params": params[:2], "name": "encoder"}, {"params": params[2:], "name": "decoder", "rank": 4}])
    torchs = peer(name, [{"params": leaves(device)[:2]}, {"params": leaves(device)[2:]}])
    torchs.load_state_dict(opt.state_dict())
    other = ours(name, [{"params": leaves(device)[:2]}, {"params": leaves(device)[2:]}])
    other.load_state_dict(torchs.state_dict())
    assert [group["name"] for group in other.param_groups] == ["encoder", "decoder"]
    assert other.param_groups[1]["rank"] == 4


@each_optimizer
def test_parameters_without_state_stay_without(name, device):
    params, fresh = leaves(device), leaves(device)
    opt, other = ours(name, params), ours(name, fresh)
    give_grads(0, params, missing=(0, 2))
    opt.step()
    other.load_state_dict(opt.state_dict())
    assert sorted(other.state_dict()["state"]) == [1, 3]
    assert not other.state.get(fresh[0])


@each_optimizer
def test_layout_of_the_state_survives(name, backend, device):
    """Channels-last moments read as contiguous would be moments of other elements."""

    def channels_last():
        (p,) = leaves(device, shapes=((2, 3, 4, 5),))
        p.data = p.data.to(memory_format=torch.channels_last)
        return [p]

    params, resumed, theirs = channels_last(), channels_last(), channels_last()
    opt, other, torchs = ours(name, params, backend), ours(name, resumed, backend), peer(name, theirs)
    train(range(2), (params, opt), (theirs, torchs))
    other.load_state_dict(through_a_file(opt.state_dict()))
    strides = [{key: v.stride() for key, v in o.state_dict()["state"][0].items()} for o in (opt, other)]
    assert strides[0] == strides[1]
    resumed[0].data = params[0].data.clone()
    train(range(2, 4), (params, opt), (resumed, other), (theirs, torchs))
    assert_same(other, opt, rtol=0, atol=0)
    assert_same(opt, torchs)


# Dtypes


def awkward(shape, dtype, seed):
    """Random values with the ones among them that casts lose or canonicalise."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1 / 3, torch.finfo(dtype).tiny, torch.finfo(dtype).max]
    flat = tensor.reshape(-1)
    flat[: len(special)] = torch.tensor(special, dtype=torch.float64).to(dtype)[: flat.numel()]
    return tensor


@each_optimizer
@pytest.mark.parametrize("p_dtype", DTYPES)
@pytest.mark.parametrize("s_dtype", DTYPES)
def test_trap_22_every_state_is_restored_in_its_own_dtype_bit_for_bit(name, p_dtype, s_dtype, device):
    params = leaves(device, p_dtype)
    opt = ours(name, params, "eager")
    train(range(1), (params, opt))
    for i, p in enumerate(params):
        for key, value in opt.state[p].items():
            if key != "step":
                opt.state[p][key] = awkward(value.shape, s_dtype, seed=i).to(device)
    saved = copy.deepcopy(opt.state_dict())
    assert {v.dtype for s in saved["state"].values() for key, v in s.items() if key != "step"} == {s_dtype}
    for reload in (lambda: saved, lambda: through_a_file(saved)):
        other = ours(name, leaves(device, p_dtype), "eager")
        other.load_state_dict(reload())
        assert_same_states(other.state_dict(), saved)


@each_optimizer
@pytest.mark.parametrize("p_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.bool])
def test_trap_22_codes_of_a_state_stay_integers(name, p_dtype, dtype, device):
    """Whatever else a state holds, the quantized codes and scales of a codec say."""
    params = leaves(device, p_dtype)
    opt = ours(name, params, "eager")
    train(range(1), (params, opt))
    for i, p in enumerate(params):
        opt.state[p]["codes"] = torch.randint(0, 2, (7,), generator=torch.Generator().manual_seed(i)).to(device, dtype)
    saved = copy.deepcopy(opt.state_dict())
    other = ours(name, leaves(device, p_dtype), "eager")
    other.load_state_dict(saved)
    assert_same_states(other.state_dict(), saved)


DTYPE_PAIRS = list(itertools.product(DTYPES, DTYPES))
MIXED = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.bfloat16)]
HALVES = [pair for pair in DTYPE_PAIRS if pair[0] != pair[1] and pair[1].itemsize == 2]
# The interpreter is slow, and a compilation takes seconds: the conversions are the same for every rule.
RESUMED = [
    pytest.param(name, pinned, *pair, marks=marks, id="-".join([name, pinned, *(str(d).split(".")[1] for d in pair)]))
    for name in PEERS
    for pinned, pairs, marks in (
        ("eager", DTYPE_PAIRS, ()),
        ("triton", HALVES + MIXED[:1] if name == "AdamW" else MIXED, TRITON),
        ("compiled", MIXED[:1] if name == "AdamW" else [], ()),
    )
    for pair in pairs
]


@pytest.mark.parametrize(("name", "pinned", "p_dtype", "s_dtype"), RESUMED)
def test_training_resumes_bit_for_bit_with_states_of_another_dtype(name, pinned, p_dtype, s_dtype, device):
    shapes = ((4, 3), (5,))
    params, eager = leaves(device, p_dtype, shapes), leaves(device, p_dtype, shapes)
    opt, reference = ours(name, params, pinned), ours(name, eager, "eager")
    train(range(1), (params, opt), (eager, reference))
    for optimizer, model in ((opt, params), (reference, eager)):
        for p in model:
            for key, value in optimizer.state[p].items():
                if key != "step":
                    optimizer.state[p][key] = value.to(s_dtype)
    train(range(1, 2), (params, opt), (eager, reference))
    resumed = [torch.nn.Parameter(value) for value in values(params)]
    other = ours(name, resumed, pinned)
    other.load_state_dict(through_a_file(opt.state_dict()))
    train(range(2, 4), (params, opt), (resumed, other), (eager, reference))
    for p, q in zip(params, resumed, strict=True):
        assert_bitwise(q, p)
    saved = opt.state_dict()
    assert_same_states(other.state_dict(), saved)
    assert {v.dtype for s in saved["state"].values() for key, v in s.items() if key != "step"} == {s_dtype}
    # Nor are they bit for bit the same nonsense: a few roundings, of values of order 1, from the eager backend.
    rounding = 4 * max(torch.finfo(p_dtype).eps, torch.finfo(s_dtype).eps)
    assert_same(opt, reference, rtol=rounding, atol=rounding)


# Old and foreign forms of what we keep


@each_optimizer
def test_trap_25_checkpoint_without_the_newer_group_keys(name, backend, device):
    params, theirs = leaves(device), leaves(device)
    opt, torchs = ours(name, params, backend), peer(name, theirs)
    train(range(2), (params, opt), (theirs, torchs))
    old = copy.deepcopy(torchs.state_dict())
    for key in NEWER_KEYS[name]:
        del old["param_groups"][0][key]
    opt.load_state_dict(old)
    group, expected = opt.param_groups[0], torchs.param_groups[0]
    assert set(group) == set(expected)
    # torch fills SGD's fused with False. Off is off.
    assert {key: group[key] or None for key in NEWER_KEYS[name]} == {
        key: expected[key] or None for key in NEWER_KEYS[name]
    }
    train(range(2, 4), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)


@counting
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
def test_trap_25_step_in_another_form_becomes_torchs(name, form, device):
    params, theirs = leaves(device), leaves(device)
    opt, torchs = ours(name, params), peer(name, theirs)
    train(range(2), (theirs, torchs))
    saved = copy.deepcopy(torchs.state_dict())
    for state in saved["state"].values():
        state["step"] = form(state["step"])
    opt.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(params, theirs, strict=True):
            p.copy_(q)
    train(range(2, 4), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)
    for state in opt.state_dict()["state"].values():
        assert (state["step"].dtype, state["step"].shape, state["step"].device.type) == (torch.float32, (), "cpu")


@counting
def test_trap_15_step_counts_on_where_bfloat16_would_stand_still(name, backend, device):
    params = leaves(device)
    opt = ours(name, params, backend)
    train(range(1), (params, opt))
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["step"] = torch.tensor(256.0, dtype=torch.bfloat16)
    opt.load_state_dict(saved)
    train(range(1, 3), (params, opt))
    assert {state["step"].item() for state in opt.state_dict()["state"].values()} == {258.0}


@counting
def test_trap_24_step_is_a_0_dim_float32_tensor_on_the_cpu(name, backend, device):
    params = leaves(device)
    opt = ours(name, params, backend)
    for step in range(3):
        give_grads(step, params, missing=(1,) if step else ())
        opt.step()
        for i, p in enumerate(params):
            count = 1 if i == 1 else step + 1
            for t in (opt.state[p]["step"], opt.state_dict()["state"][i]["step"]):
                assert isinstance(t, torch.Tensor)
                assert (t.dtype, t.shape, t.device.type, t.item()) == (torch.float32, (), "cpu", count)


@pytest.mark.gpu
@counting
def test_trap_24_step_is_on_the_gpu_when_capturable(name, backend, device):
    params, theirs = leaves(device), leaves(device)
    opt, torchs = ours(name, params, backend, capturable=True), peer(name, theirs, capturable=True)
    train(range(2), (params, opt), (theirs, torchs))
    opt.load_state_dict(through_a_file(torchs.state_dict()))
    train(range(2, 4), (params, opt), (theirs, torchs))
    assert {opt.state[p]["step"].device.type for p in params} == {device.type}
    assert_same(opt, torchs)


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
def test_trap_32_nothing_handed_out_aliases_step(backend, passed_on, device):
    params = leaves(device)
    opt = ours("AdamW", params, backend)
    train(range(2), (params, opt))
    counts = steps(passed_on(opt))
    assert len(counts) == len(params)
    assert distinct(counts)
    assert all(t == 2 for t in counts)


@counting
def test_trap_32_torch_foreach_counts_a_loaded_step_once(name, backend, device):
    """Its foreach adds 1 to every `step` in the list: aliased ones would count each other's steps."""
    params, theirs = leaves(device), leaves(device)
    opt, torchs = ours(name, params, backend), peer(name, theirs, foreach=True)
    train(range(2), (params, opt))
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        group["foreach"] = True
    torchs.load_state_dict(saved)
    train(range(2, 3), (theirs, torchs))
    assert [t.item() for t in steps(torchs.state_dict())] == [3.0] * len(params)


@counting
def test_trap_32_aliased_steps_of_a_loaded_checkpoint_count_once(name, backend, device):
    params, theirs = leaves(device), leaves(device)
    opt, torchs = ours(name, params, backend), peer(name, theirs)
    train(range(2), (params, opt), (theirs, torchs))
    saved, shared = opt.state_dict(), torch.tensor(2.0)
    for state in saved["state"].values():
        state["step"] = shared
    opt.load_state_dict(saved)
    train(range(2, 4), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)
    assert distinct(steps(opt.state_dict()))
    assert shared == 2  # the checkpoint's own tensor is not counted up


@counting
def test_trap_32_counts_part_when_gradients_do(name, backend, device):
    """A shared count must be given up as soon as one parameter skips a step, or its state is replaced."""
    params, theirs = leaves(device), leaves(device)
    opt, torchs = ours(name, params, backend), peer(name, theirs)
    for step, missing in enumerate([(), (), (1, 3), (0,), ()]):
        give_grads(step, params, theirs, missing=missing)
        opt.step()
        torchs.step()
        assert [t.item() for t in steps(opt.state_dict())] == [t.item() for t in steps(torchs.state_dict())]
    assert_same(opt, torchs)


# torch.distributed.checkpoint


@pytest.fixture(scope="module")
def dcp():
    if not torch.distributed.is_available():
        pytest.skip("this torch was built without torch.distributed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch's own imports
        import torch.distributed.checkpoint.state_dict as module
    return module


def model(device):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(device)


@each_optimizer
@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float lr", "tensor lr"])
def test_trap_23_distributed_checkpoint_leaves_a_fresh_optimizer_fresh(name, backend, lr, dcp, device):
    """It steps a fresh optimizer with gradients of zero and lr 0, to see what states there are."""
    net, theirs, untouched = model(device), model(device), model(device)
    opt, torchs = ours(name, net.parameters(), backend, lr=lr), peer(name, theirs.parameters(), lr=lr)
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
        assert not any(value.any() for key, value in state.items() if key != "step")
    # What matters: it trains as if nobody had looked.
    other = ours(name, untouched.parameters(), backend, lr=lr)
    train(range(3), (list(net.parameters()), opt), (list(untouched.parameters()), other))
    assert_same(opt, other, rtol=0, atol=0)


@each_optimizer
def test_distributed_checkpoint_resumes(name, backend, dcp, device):
    net, resumed = model(device), model(device)
    opt, other = ours(name, net.parameters(), backend), ours(name, resumed.parameters(), backend)
    train(range(2), (list(net.parameters()), opt))
    saved = through_a_file(dcp.get_optimizer_state_dict(net, opt))
    resumed.load_state_dict(net.state_dict())
    dcp.set_optimizer_state_dict(resumed, other, saved)
    assert_same_states(other.state_dict(), opt.state_dict())
    train(range(2, 4), (list(net.parameters()), opt), (list(resumed.parameters()), other))
    assert_same(other, opt, rtol=0, atol=0)
