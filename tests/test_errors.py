"""Bad input: the exception type that torch raises, a message with value, cause and fix, and nothing changed.

torch is asked, not quoted: each case is run against torch.optim first, and what it raises there is what ours must
raise. Lion, which torch lacks, is held to AdamW's types.
"""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from test_contract import (
    SETTINGS,
    TRITON,
    assert_equal,
    assert_same,
    each_optimizer,
    give_grads,
    leaves,
    ours,
    train,
    values,
)
from torch.nn import Parameter

import triton_optim as to

TORCH = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD, "Lion": torch.optim.AdamW}


def raised_by(action):
    with pytest.raises(Exception) as error:  # noqa: PT011 (which one is the question)
        action()
    assert not isinstance(error.value, Warning)  # these are errors here
    return error.type


def explains(error, *parts):
    """The value and the cause (each of `parts` is in the message), and a fix: a sentence more than the complaint."""
    message = str(error.value)
    missing = [part for part in parts if str(part) not in message]
    assert not missing, f"{missing} not in: {message}"
    sentences = [s for s in message.replace(": ", ". ").split(". ") if s.strip()]
    assert len(sentences) > 1, f"no fix in: {message}"


class Unchanged:
    """A context in which parameters, gradients, states and groups must stay as they are, bit for bit."""

    def __init__(self, opt):
        self.opt = opt

    def look(self):
        params = [p for group in self.opt.param_groups for p in group["params"]]
        grads = [None if p.grad is None else p.grad.detach().to_dense() for p in params]
        states = self.opt.state_dict()["state"]
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.opt.param_groups]
        ids = [[id(p) for p in group["params"]] for group in self.opt.param_groups]
        return copy.deepcopy((values(params), grads, states, groups, ids))

    def __enter__(self):
        self.before = self.look()

    def __exit__(self, exception, *_):
        if exception is None:
            return  # left for pytest.raises to report
        torch.testing.assert_close(self.look(), self.before, rtol=0, atol=0)


# Hyperparameters

NEGATIVE = torch.tensor(-0.5)
ADAMS = ["AdamW", "Adam", "Lion"]
ALL = [*ADAMS, "SGD"]
HYPERPARAMETERS = [
    # optimizers, arguments, what the message must name
    (ALL, {"lr": -1.5}, ["learning rate", -1.5]),
    (ALL, {"lr": NEGATIVE}, ["learning rate", -0.5]),
    (ADAMS, {"lr": float("nan")}, ["learning rate", "nan"]),
    (ALL, {"lr": torch.tensor([0.1, 0.2])}, ["1-element"]),
    (ADAMS, {"betas": (1.0, 0.9)}, ["beta parameter at index 0", 1.0]),
    (ADAMS, {"betas": (-0.25, 0.9)}, ["beta parameter at index 0", -0.25]),
    (ADAMS, {"betas": (0.9, 1.5)}, ["beta parameter at index 1", 1.5]),
    (ADAMS, {"betas": (0.9, -0.25)}, ["beta parameter at index 1", -0.25]),
    (ADAMS, {"betas": (float("nan"), 0.9)}, ["beta parameter at index 0", "nan"]),
    (ADAMS, {"betas": (torch.tensor(1.5), torch.tensor(0.9))}, ["beta parameter at index 0", 1.5]),
    (["AdamW", "Adam"], {"eps": -1e-8}, ["epsilon", -1e-08]),
    (ADAMS, {"weight_decay": -0.125}, ["weight_decay", -0.125]),
    (["SGD"], {"weight_decay": -0.125}, ["weight_decay", -0.125]),
    (["SGD"], {"momentum": -0.5}, ["momentum", -0.5]),
    (["SGD"], {"momentum": 0.0, "nesterov": True}, ["Nesterov", "momentum"]),
    (["SGD"], {"momentum": 0.9, "dampening": 0.25, "nesterov": True}, ["Nesterov", "dampening"]),
    (ALL, {"foreach": True, "fused": True}, ["foreach", "fused"]),
    (ALL, {"differentiable": True, "fused": True}, ["differentiable", "fused"]),
]


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        pytest.param(name, arguments, named, id=f"{name}-{' '.join(f'{k}={v}' for k, v in arguments.items())}")
        for names, arguments, named in HYPERPARAMETERS
        for name in names
    ],
)
def test_wrong_hyperparameter(name, arguments, named, device):
    expected = raised_by(lambda: TORCH[name](leaves(device), **arguments))
    with pytest.raises(expected) as error:
        getattr(to, name)(leaves(device), **arguments)
    explains(error, *named)


@each_optimizer
@pytest.mark.parametrize(
    "arguments",
    [{"lr": None}, {"lr": "0.1"}, {"weight_decay": None}, {"learning_rate": 0.1}],
    ids=["no lr", "lr a string", "no weight_decay", "unknown argument"],
)
def test_hyperparameter_of_the_wrong_type(name, arguments, device):
    with pytest.raises(raised_by(lambda: TORCH[name](leaves(device), **arguments))):
        getattr(to, name)(leaves(device), **arguments)


@pytest.mark.parametrize("name", ADAMS)
@pytest.mark.parametrize("betas", [0.9, None, (0.9,)], ids=str)
def test_betas_of_the_wrong_form(name, betas, device):
    with pytest.raises(raised_by(lambda: TORCH[name](leaves(device), betas=betas))):
        getattr(to, name)(leaves(device), betas=betas)


# Parameters

PARAMS = {
    "none": lambda p: None,
    "empty": lambda p: [],
    "empty generator": lambda p: iter(()),
    "a tensor": lambda p: p,
    "numbers": lambda p: [1.0],
    "a string": lambda p: ["weight"],
    "not a leaf": lambda p: [p * 2],
    "not a leaf, in the second group": lambda p: [{"params": [p]}, {"params": [p * 2]}],
    "a set in a group": lambda p: [{"params": {p}}],
    "a group without params": lambda p: [{"lr": 0.1}],
    "some without names": lambda p: [("weight", p), torch.zeros(1)],
    "a group without names": lambda p: [{"params": [("weight", p)]}, {"params": [torch.zeros(1)]}],
    "twice": lambda p: [{"params": [p]}, {"params": [p]}],
    "no group": lambda p: [{"params": [p]}, p],
}


@each_optimizer
@pytest.mark.parametrize("params", list(PARAMS))
def test_wrong_parameters(name, params):
    def build():
        return PARAMS[params](Parameter(torch.ones(3)))

    with pytest.raises(raised_by(lambda: TORCH[name](build()))):
        getattr(to, name)(build())


@each_optimizer
@pytest.mark.parametrize(
    "group", [name for name in PARAMS if name in ("none", "a string", "not a leaf", "a set in a group")]
)
def test_wrong_group_added_later_changes_nothing(name, group, device):
    def add(opt):
        return lambda: opt.add_param_group(wrong)

    content = PARAMS[group](Parameter(torch.ones(3)))
    wrong = content[0] if group == "a set in a group" else {"params": content}
    expected = raised_by(add(TORCH[name](leaves(device))))
    params = leaves(device)
    opt = ours(name, params)
    train(range(1), (params, opt))
    with pytest.raises(expected), Unchanged(opt):
        add(opt)()
    train(range(1, 2), (params, opt))


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_parameter_that_is_not_floating_point(name, dtype, device):
    """torch notices when it steps. Ours may earlier, with the same type, and before anything is written."""

    def build(make):
        whole, weight = torch.ones(3, dtype=dtype, device=device), leaves(device)[0]
        opt = make([weight, whole])
        whole.grad, weight.grad = torch.ones_like(whole), torch.ones_like(weight)
        held.update(weight=weight, whole=whole, opt=opt)
        opt.step()

    held = {}
    # torch's for-loop stumbles over each dtype in its own way; fused=True raises RuntimeError for all of them.
    expected = raised_by(lambda: build(TORCH[name]))
    held.clear()
    with pytest.raises((expected, RuntimeError)) as error:
        build(getattr(to, name))
    explains(error, dtype)
    if held:  # it was accepted, and refused when it came to step
        assert_equal([held["weight"], held["whole"]], [leaves(device)[0], torch.ones(3, dtype=dtype, device=device)])
        assert not held["opt"].state_dict()["state"]


# Backends


@each_optimizer
@pytest.mark.parametrize("unknown", ["tirton", "cuda", ""])
def test_unknown_backend(name, unknown, device):
    with pytest.raises(ValueError, match="backend") as error:
        getattr(to, name)(leaves(device), backend=unknown)
    explains(error, repr(unknown), "auto", "triton", "compiled", "eager")


@each_optimizer
@pytest.mark.parametrize("unknown", [None, 3, ["eager"]], ids=repr)
def test_backend_that_is_no_string(name, unknown, device):
    with pytest.raises((ValueError, TypeError)) as error:
        getattr(to, name)(leaves(device), backend=unknown)
    explains(error, "backend", repr(unknown))


@each_optimizer
@pytest.mark.parametrize("pinned", ["compiled", pytest.param("triton", marks=TRITON)])
def test_pinned_backend_that_cannot_be_differentiable(name, pinned, device):
    """torch: `fused` with `differentiable` is a RuntimeError."""
    expected = raised_by(lambda: TORCH[name](leaves(device), fused=True, differentiable=True))
    params = leaves(device)
    give_grads(0, params)
    with pytest.raises(expected) as error:
        ours(name, params, pinned, differentiable=True).step()
    explains(error, pinned, "differentiable")
    assert_equal(params, leaves(device))


@each_optimizer
@pytest.mark.parametrize("pinned", ["compiled", pytest.param("triton", marks=TRITON)])
def test_pinned_backend_and_complex_parameters(name, pinned, device):
    params = leaves(device, torch.complex64)
    give_grads(0, params)
    with pytest.raises(RuntimeError) as error:
        ours(name, params, pinned).step()
    explains(error, pinned, "complex64")
    assert_equal(params, leaves(device, torch.complex64))


@each_optimizer
def test_pinned_backend_that_cannot_run_a_group_added_later(name, device):
    params = leaves(device)
    opt = ours(name, params, "compiled")
    with pytest.raises(RuntimeError) as error, Unchanged(opt):
        opt.add_param_group({"params": leaves(device, torch.complex64)})
    explains(error, "compiled", "complex64")


WITHOUT_INTERPRETER_OR_COMPILER = """
    import torch
    import triton_optim as to

    for name in ("AdamW", "Adam", "SGD", "Lion"):
        for backend in ("triton", "compiled", "auto"):
            p = torch.nn.Parameter(torch.ones(3))
            p.grad = torch.ones(3)
            try:
                getattr(to, name)([p], lr=0.5, backend=backend).step()
            except RuntimeError as error:
                assert torch.equal(p, torch.ones(3)), "changed"
                print(name, backend, "raised", error)
            else:
                print(name, backend, "ran", not torch.equal(p, torch.ones(3)))
"""


def test_pinned_backend_that_this_machine_lacks(tmp_path):
    """No GPU and no interpreter, no compiler: pinned backends say so, and only auto falls back."""
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "CC", "CXX")}
    # An empty PATH has no compiler, and an empty cache nothing that an earlier one made.
    environment |= {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    script = textwrap.dedent(WITHOUT_INTERPRETER_OR_COMPILER)
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name in SETTINGS:
        triton = next(line for line in lines if line.startswith(f"{name} triton raised"))
        compiled = next(line for line in lines if line.startswith(f"{name} compiled raised"))
        for message, parts in ((triton, ("cpu", "GPU")), (compiled, ("compiler",))):
            assert all(part in message for part in parts), message
            assert "leave backend out" in message.lower()
        assert f"{name} auto ran True" in lines


# Gradients


def replaced(p, data):
    """The way around autograd's own check of shape and dtype: what was a fitting gradient no longer fits."""
    p.grad = torch.ones_like(p)
    p.data = data


@each_optimizer
@pytest.mark.parametrize("started", [False, True], ids=["first step", "later step"])
def test_trap_9_gradient_of_another_shape(name, backend, started, device):
    """torch has then stepped the parameters before it. Ours checks the whole list before the first write."""

    def build(make):
        params = leaves(device)[::-1]
        opt = make([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}])
        if started:
            train(range(1), (params, opt))
        give_grads(1, params)
        replaced(params[3], torch.ones(7, device=device))
        if started:  # so that the gradient alone is at odds, not the state as well
            state = opt.state[params[3]]
            state.update({key: torch.zeros(7, device=device) for key in state if key != "step"})
        return params, opt

    expected = raised_by(lambda: build(TORCH[name])[1].step())
    params, opt = build(lambda groups: ours(name, groups, backend))
    with pytest.raises(expected) as error, Unchanged(opt):
        opt.step()
    explains(error, "parameter 3", "4, 3", "7")
    give_grads(2, params)
    opt.step()  # and it goes on once the gradient fits


@each_optimizer
def test_gradient_that_would_only_broadcast(name, backend, device):
    """torch's for-loop stretches it, its fused kernel reads past its end. Refused here, as any other misfit."""
    params = leaves(device)
    opt = ours(name, params, backend)
    give_grads(0, params)
    params[1].data = torch.ones(1, device=device)
    params[1].grad = torch.ones(1, device=device)
    params[1].data = torch.ones(5, device=device)
    with pytest.raises(RuntimeError) as error, Unchanged(opt):
        opt.step()
    explains(error, "parameter 1", "1", "5")


@pytest.mark.gpu
@each_optimizer
def test_gradient_on_another_device(name, backend, device):
    def build(make):
        params = leaves(device)
        opt = make(params)
        train(range(1), (params, opt))
        params[0].data = params[0].data.cpu()  # the way around autograd's own check
        return opt

    expected = raised_by(build(TORCH[name]).step)
    opt = build(lambda params: ours(name, params, backend))
    with pytest.raises(expected) as error, Unchanged(opt):
        opt.step()
    explains(error, "cpu")


def sparse(p):
    ones = torch.ones(2, *p.shape[1:], device=p.device)
    return torch.sparse_coo_tensor([[0, 2]], ones, p.shape, check_invariants=True)


@pytest.mark.parametrize("name", ADAMS)
@pytest.mark.parametrize("started", [False, True], ids=["first step", "later step"])
def test_trap_8_sparse_gradient(name, backend, started, device):
    def build(make):
        params = leaves(device)
        opt = make(params[::-1])  # dense ones before it
        if started:
            train(range(1), (params, opt))
        give_grads(1, params)
        params[0].grad = sparse(params[0])
        return opt

    expected = raised_by(lambda: build(TORCH[name]).step())
    opt = build(lambda params: ours(name, params, backend))
    with pytest.raises(expected) as error, Unchanged(opt):
        opt.step()
    explains(error, "sparse", name)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"maximize": True}], ids=str)
def test_trap_8_sgd_takes_sparse_gradients_as_torchs_does(settings, backend, device):
    """Embedding(sparse=True) with SGD is a documented pair."""
    settings = {"lr": 0.1} | settings
    params, theirs = leaves(device), leaves(device)
    opt, torchs = to.SGD(params, **settings, backend=backend), torch.optim.SGD(theirs, **settings, foreach=False)
    for step in range(3):
        give_grads(step, params, theirs)
        for p in (params[0], theirs[0]):
            p.grad = sparse(p) * (step + 1)
        opt.step()
        torchs.step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# State dicts of something else


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
    "a group without lr": lacking("lr"),
    "a group without weight_decay": lacking("weight_decay"),
}


def load_and_step(opt, saved):
    """torch finds some faults only when it steps."""
    opt.load_state_dict(saved)
    opt.step()


@each_optimizer
@pytest.mark.parametrize("fault", list(FOREIGN))
def test_foreign_state_dict(name, fault, device):
    def build(make):
        params = leaves(device)
        opt = make(params)
        train(range(2), (params, opt))
        return opt, FOREIGN[fault](copy.deepcopy(opt.state_dict()))

    expected = raised_by(lambda: load_and_step(*build(TORCH[name])))
    opt, saved = build(lambda params: ours(name, params))
    with pytest.raises(expected), Unchanged(opt):
        opt.load_state_dict(saved)
    opt.step()


@pytest.mark.parametrize(
    ("saver", "settings", "loader"),
    [
        *(("SGD", {"momentum": momentum}, loader) for momentum in (0.0, 0.9) for loader in ("AdamW", "Adam")),
        *((saver, {}, "SGD") for saver in ("AdamW", "Adam", "Lion")),
        ("Lion", {}, "AdamW"),
    ],
    ids=str,
)
def test_state_dict_of_another_optimizer(saver, settings, loader, device):
    """There is no torch.optim.Lion, so there ours plays the saver."""
    source = leaves(device)
    first = ours(saver, source, **settings)
    train(range(2), (source, first))
    saved = first.state_dict()

    def build(make):
        params = leaves(device)
        opt = make(params)
        train(range(1), (params, opt))
        return opt

    expected = raised_by(lambda: load_and_step(build(TORCH[loader]), copy.deepcopy(saved)))
    opt = build(lambda params: ours(loader, params))
    with pytest.raises(expected) as error, Unchanged(opt):
        opt.load_state_dict(copy.deepcopy(saved))
    explains(error, loader)


@each_optimizer
def test_state_of_another_shape(name, backend, device):
    """The same number of parameters, of another model. A kernel would read past the end of these states."""
    source = leaves(device, shapes=((4, 2), (5,), (0,), ()))
    first = ours(name, source, "eager")
    train(range(2), (source, first))
    saved = first.state_dict()

    def build(make):
        params = leaves(device)
        give_grads(0, params)
        return make(params)

    # What torch says when that meets a parameter, whichever optimizer's state it is.
    torchs = ours("SGD", leaves(device, shapes=((4, 2), (5,), (0,), ())), "eager").state_dict()
    torchs["state"] = {0: {"momentum_buffer": torch.zeros(4, 2, device=device)}}
    expected = raised_by(lambda: load_and_step(build(lambda p: torch.optim.SGD(p, momentum=0.9)), torchs))
    opt = build(lambda params: ours(name, params, backend))
    with pytest.raises(expected) as error, Unchanged(opt):
        load_and_step(opt, saved)
    explains(error, "parameter 0", "4, 2", "4, 3")


@each_optimizer
def test_state_of_another_shape_put_there_by_hand(name, backend, device):
    params = leaves(device)
    opt = ours(name, params, backend)
    train(range(1), (params, opt))
    key = "momentum_buffer" if name == "SGD" else "exp_avg"
    opt.state[params[0]][key] = torch.zeros(4, 2, device=device)
    give_grads(1, params)
    with pytest.raises(RuntimeError) as error, Unchanged(opt):
        opt.step()
    explains(error, key, "parameter 0", "4, 2", "4, 3")


@each_optimizer
def test_failed_load_leaves_an_optimizer_that_trains_on(name, device):
    """Side by side with one that was never asked to load anything."""
    params, theirs = leaves(device), leaves(device)
    opt, other = ours(name, params), ours(name, theirs)
    train(range(2), (params, opt), (theirs, other))
    with pytest.raises(ValueError, match="parameter group"):
        opt.load_state_dict(shortened(copy.deepcopy(opt.state_dict())))
    train(range(2, 4), (params, opt), (theirs, other))
    assert_same(opt, other, rtol=0, atol=0)


@each_optimizer
def test_fused_step_of_parameters_without_memory(name):
    linear = torch.nn.Linear(2, 3, device="meta")
    optimizer = getattr(to, name)(linear.parameters(), fused=True)
    for p in linear.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        optimizer.step()
