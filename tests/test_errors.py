"""Bad input: the exception type that torch raises, a message with value, cause and fix, and nothing changed.

torch is asked, not quoted: each case is run against torch.optim first, and what it raises there is what ours must
raise. One that torch lacks is held to AdamW's types.
"""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from complaints import Unchanged, explains, raised_by
from conftest import CPP, TRITON
from side_by_side import assert_equal, give_grads, leaf, ours, torchs, train
from table import KINDS, each_kind, each_kind_and_backend, rows, rows_and_backends

DENSE = [case for case in KINDS if not case.sparse]


# A matrix is one of real numbers to who takes it as a matrix; sparse ones are made of rows of real numbers.
COMPLEX = [case for case in KINDS if case.complex]


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
    "some without names": lambda p: [("weight", p), torch.zeros(2, 2)],
    "a group without names": lambda p: [{"params": [("weight", p)]}, {"params": [torch.zeros(2, 2)]}],
    "twice": lambda p: [{"params": [p]}, {"params": [p]}],
    "no group": lambda p: [{"params": [p]}, p],
}


@each_kind
@pytest.mark.parametrize("params", list(PARAMS))
def test_wrong_parameters(case, params):
    def build():
        return PARAMS[params](case.parameters()[0])

    with pytest.raises(raised_by(lambda: torchs(case)(build()))):
        case.ours(build())


@each_kind
@pytest.mark.parametrize(
    "group", [name for name in PARAMS if name in ("none", "a string", "not a leaf", "a set in a group")]
)
def test_wrong_group_added_later_changes_nothing(case, group, device):
    def add(opt):
        return lambda: opt.add_param_group(wrong)

    content = PARAMS[group](case.parameters()[0])
    wrong = content[0] if group == "a set in a group" else {"params": content}
    expected = raised_by(add(torchs(case)(case.parameters(device))))
    params = case.parameters(device)
    opt = ours(case, params)
    train(case, range(1), (params, opt))
    with pytest.raises(expected), Unchanged(opt):
        add(opt)()
    train(case, range(1, 2), (params, opt))


@each_kind
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_parameter_that_is_not_floating_point(case, dtype, device):
    """torch notices when it steps. Ours may earlier, with the same type, and before anything is written."""

    def build(make):
        weight = case.parameters(device)[0]
        whole = torch.ones_like(weight, dtype=dtype).detach()
        opt = make([weight, whole])
        for p in (whole, weight):
            p.grad = torch.ones_like(p).to_sparse(1) if case.sparse else torch.ones_like(p)
        held.update(weight=weight, whole=whole, opt=opt)
        opt.step()

    held = {}
    # torch's for-loop stumbles over each dtype in its own way; fused=True raises RuntimeError for all of them.
    expected = raised_by(lambda: build(torchs(case)))
    held.clear()
    with pytest.raises((expected, RuntimeError)) as error:
        build(case.ours)
    explains(error, dtype)
    if held:  # it was accepted, and refused when it came to step
        start = case.parameters(device)[0]
        assert_equal([held["weight"], held["whole"]], [start, torch.ones_like(start, dtype=dtype)])
        assert not held["opt"].state_dict()["state"]


# Backends


@each_kind
@pytest.mark.parametrize("unknown", ["tirton", "cuda", ""])
def test_unknown_backend(case, unknown, device):
    with pytest.raises(ValueError, match="backend") as error:
        case.ours(case.parameters(device), backend=unknown)
    explains(error, repr(unknown), "auto", "triton", "cpp", "compiled", "eager")


@each_kind
@pytest.mark.parametrize("unknown", [None, 3, ["eager"]], ids=repr)
def test_backend_that_is_no_string(case, unknown, device):
    with pytest.raises((ValueError, TypeError)) as error:
        case.ours(case.parameters(device), backend=unknown)
    explains(error, "backend", repr(unknown))


@each_kind
@pytest.mark.parametrize("pinned", ["compiled", pytest.param("cpp", marks=CPP), pytest.param("triton", marks=TRITON)])
def test_pinned_backend_that_cannot_be_differentiable(case, pinned, device):
    """torch: `fused` with `differentiable` is a RuntimeError."""
    expected = raised_by(lambda: torch.optim.AdamW(leaf(), fused=True, differentiable=True))
    params = case.parameters(device)
    give_grads(case, 0, params)
    with pytest.raises(expected) as error:
        ours(case, params, pinned, differentiable=True).step()
    explains(error, pinned, "differentiable")
    assert_equal(params, case.parameters(device))


@rows(*COMPLEX)
@pytest.mark.parametrize("pinned", ["compiled", pytest.param("cpp", marks=CPP), pytest.param("triton", marks=TRITON)])
def test_pinned_backend_and_complex_parameters(case, pinned, device):
    params = case.parameters(device, torch.complex64)
    give_grads(case, 0, params)
    with pytest.raises(RuntimeError) as error:
        ours(case, params, pinned).step()
    explains(error, pinned, "complex64")
    assert_equal(params, case.parameters(device, torch.complex64))


@rows(*COMPLEX)
def test_pinned_backend_that_cannot_run_a_group_added_later(case, device):
    params = case.parameters(device)
    opt = ours(case, params, "compiled")
    with pytest.raises(RuntimeError) as error, Unchanged(opt):
        opt.add_param_group({"params": case.parameters(device, torch.complex64)})
    explains(error, "compiled", "complex64")


WITHOUT_INTERPRETER_OR_COMPILER = """
    import torch
    import triton_optim as to

    for name in {names}:
        for backend in ("triton", "cpp", "compiled", "auto"):
            p = torch.nn.Parameter(torch.ones(2, 3))
            p.grad = torch.ones(2, 3)
            try:
                getattr(to, name)([p], lr=0.5, backend=backend).step()
            except RuntimeError as error:
                assert torch.equal(p, torch.ones(2, 3)), "changed"
                print(name, backend, "raised", error)
            else:
                print(name, backend, "ran", not torch.equal(p, torch.ones(2, 3)))
"""


def test_pinned_backend_that_this_machine_lacks(tmp_path):
    """No GPU and no interpreter, no compiler: pinned backends say so, and only auto falls back."""
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "CC", "CXX")}
    # An empty PATH has no compiler, and an empty cache nothing that an earlier one made.
    environment |= {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    script = textwrap.dedent(WITHOUT_INTERPRETER_OR_COMPILER).replace("{names}", repr([case.name for case in DENSE]))
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name in (case.name for case in DENSE):
        triton = next(line for line in lines if line.startswith(f"{name} triton raised"))
        compiled = next(line for line in lines if line.startswith(f"{name} compiled raised"))
        cpp = next(line for line in lines if line.startswith(f"{name} cpp raised"))
        for message, parts in ((triton, ("cpu", "GPU")), (cpp, ("compiler",)), (compiled, ("compiler",))):
            assert all(part in message for part in parts), message
            assert "leave backend out" in message.lower()
        assert f"{name} auto ran True" in lines


# Gradients


def replaced(p, data):
    """The way around autograd's own check of shape and dtype: what was a fitting gradient no longer fits."""
    p.grad = torch.ones_like(p)
    p.data = data


@rows_and_backends(*DENSE)
@pytest.mark.parametrize("started", [False, True], ids=["first step", "later step"])
def test_gradient_of_another_shape(case, backend, started, device):
    """torch has then stepped the parameters before it. Ours checks the whole list before the first write."""

    def build(make):
        params = case.parameters(device)[::-1]
        opt = make([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}])
        if started:
            train(case, range(1), (params, opt))
        give_grads(case, 1, params)
        other = case.parameters(device, shapes=((2, 3),))
        replaced(params[3], other[0].data)
        other_opt = make(other)
        if started:
            train(case, range(1), (other, other_opt))
        if other[0] in other_opt.state:  # so that the gradient alone is at odds, not the state as well
            opt.state[params[3]].update(other_opt.state[other[0]])
        return params, opt

    expected = raised_by(lambda: build(torchs(case))[1].step())
    params, opt = build(lambda groups: ours(case, groups, backend))
    with pytest.raises(expected) as error, Unchanged(opt):
        opt.step()
    explains(error, "parameter 3", "4, 3", "2, 3")
    give_grads(case, 2, params)
    opt.step()  # and it goes on once the gradient fits


@rows_and_backends(*DENSE)
@pytest.mark.parametrize("started", [False, True], ids=["first step", "later step"])
def test_gradient_that_would_only_broadcast(case, backend, started, device):
    """torch's for-loop stretches it, its fused kernel reads past its end. Refused here, as any other misfit."""
    params = case.parameters(device)
    opt = ours(case, params, backend)
    train(case, range(2 * started), (params, opt))
    give_grads(case, 2, params)
    data = params[0].data
    params[0].data = torch.ones(1, 3, device=device)
    params[0].grad = torch.ones(1, 3, device=device)
    params[0].data = data
    with pytest.raises(RuntimeError) as error, Unchanged(opt):
        opt.step()
    explains(error, "parameter 0", "1, 3", "4, 3")


@pytest.mark.gpu
@each_kind_and_backend
def test_gradient_on_another_device(case, backend, device):
    def build(make):
        params = case.parameters(device)
        opt = make(params)
        train(case, range(1), (params, opt))
        params[0].data = params[0].data.cpu()  # the way around autograd's own check
        return opt

    expected = raised_by(build(torchs(case)).step)
    opt = build(lambda params: ours(case, params, backend))
    with pytest.raises(expected) as error, Unchanged(opt):
        opt.step()
    explains(error, "cpu")


def sparse(p):
    ones = torch.ones(2, *p.shape[1:], device=p.device)
    return torch.sparse_coo_tensor([[0, 2]], ones, p.shape, check_invariants=True)


def refuses_sparse(case):
    """Without a decay, with which some that take them refuse them."""
    opt = ours(case, case.parameters(), **{"weight_decay": 0.0} if "weight_decay" in case.settings else {})
    return opt.sparse_gradients(opt.param_groups[0]) not in ("rows", "dense")


@rows_and_backends(*(case for case in KINDS if case.sparse or refuses_sparse(case)))
@pytest.mark.parametrize("started", [False, True], ids=["first step", "later step"])
def test_sparse_gradient_or_dense_one_where_the_other_is_taken(case, backend, started, device):
    def build(make):
        params = case.parameters(device)
        opt = make(params[::-1])  # right ones before it
        if started:
            train(case, range(1), (params, opt))
        give_grads(case, 1, params)
        params[0].grad = torch.ones_like(params[0]) if case.sparse else sparse(params[0])
        return opt

    expected = raised_by(lambda: build(torchs(case)).step())
    opt = build(lambda params: ours(case, params, backend))
    with pytest.raises(expected) as error, Unchanged(opt):
        opt.step()
    explains(error, "sparse", case.name)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # torch's Adagrad
@rows_and_backends(*(case for case in DENSE if not refuses_sparse(case)))
@pytest.mark.parametrize("maximize", [False, True])
def test_sparse_gradients_are_taken_where_torchs_takes_them(case, backend, maximize, device):
    """Embedding(sparse=True) with SGD is a documented pair."""
    # torch refuses a decay, which sparse gradients do not tell of.
    options = {"weight_decay": 0.0, "maximize": maximize}
    params, theirs = case.parameters(device), case.parameters(device)
    opt, their_opt = ours(case, params, backend, **options), case.torchs(theirs, **(case.settings | options))
    for step in range(3):
        give_grads(case, step, params, theirs)
        for p in (params[0], theirs[0]):
            p.grad = sparse(p) * (step + 1)
        opt.step()
        their_opt.step()
    for p, q in zip(params, theirs, strict=True):  # SGD's momentum is sparse in torch
        torch.testing.assert_close(p, q, **case.close)


@rows(*DENSE)
def test_fused_step_of_parameters_without_memory(case):
    p = torch.nn.Parameter(torch.empty(2, 3, device="meta"))
    opt = case.ours([p], fused=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        opt.step()
