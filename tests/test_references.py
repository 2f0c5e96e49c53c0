"""The references themselves, against torch.optim in float64; in test_references_by_hand.py against numbers."""

import inspect
import itertools

import numpy as np
import pytest
import torch
from references_matrix import newton_schulz
from table import CASES as ROWS
from table import REFERENCES

STEPS = 20
SHAPES = {row.name: [(5, 3), (3, 5), (4, 4), (1, 6)] if row.matrices else [(5, 3), (7,), (), (0,)] for row in ROWS}
SHAPES["Adafactor"] = [(5, 3), (7,), (), (2, 3, 4), (4, 1)]  # Of a parameter without elements torch divides by 0.
SPARSE = [row.name for row in ROWS if row.sparse]


@pytest.fixture(autouse=True)
def float64_scalars():
    """torch rounds NAdam's mu_product and ASGD's eta and mu to the default dtype, float32 parameters or not."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def every(**options):
    """One dict for each combination of the options' values."""
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def halved_every_five(index):
    return 0.02 * 0.5 ** (index // 5)


def shrinking(index):
    return 0.1 / (1 + index)


def falling_beta1(index):
    return 0.9 - 0.02 * index, 0.99


def momentum_on_and_off(index):
    return 0.9 if index % 4 else 0.0


def falling_momentum(index):
    return 0.9 - 0.02 * index


ADAM = [
    {},
    {"betas": (0.5, 0.7), "eps": 1e-3},
    {"lr": halved_every_five, "weight_decay": shrinking, "betas": falling_beta1},
]
ADAM_FLAGS = {"weight_decay": [0, 0.1], "amsgrad": [False, True], "maximize": [False, True]}

# Every combination that the class accepts: Nesterov momentum excludes dampening and needs momentum.
CASES = {row.name: [*row.variants.values()] for row in ROWS if row.torchs} | {
    "Adam": [*ADAM, *every(**ADAM_FLAGS, decoupled_weight_decay=[False, True])],
    "AdamW": [*ADAM, *every(**ADAM_FLAGS)],
    "SGD": [
        {},
        *every(momentum=[0, 0.9], dampening=[0, 0.3], weight_decay=[0, 0.1], maximize=[False, True]),
        *every(momentum=[0.9], nesterov=[True], weight_decay=[0, 0.1], maximize=[False, True]),
        {"lr": halved_every_five, "momentum": momentum_on_and_off, "dampening": 0.3},
    ],
    "Adadelta": [
        {},
        {"lr": halved_every_five, "rho": falling_momentum, "eps": 1e-3},
        *every(weight_decay=[0, 0.1], maximize=[False, True]),
    ],
    "Adagrad": [
        {},
        {"lr": halved_every_five, "weight_decay": shrinking, "eps": 0.1},
        *every(lr_decay=[0, 0.3], initial_accumulator_value=[0, 0.5], weight_decay=[0, 0.1], maximize=[False, True]),
    ],
    "Adamax": [*ADAM, *every(weight_decay=[0, 0.1], maximize=[False, True])],
    "ASGD": [
        {},
        {"lr": halved_every_five, "lambd": 0.3, "alpha": 0.5, "t0": 12.0, "weight_decay": shrinking},
        *every(lambd=[1e-4, 2.0], t0=[0, 7.5], weight_decay=[0, 0.1], maximize=[False, True]),
    ],
    "NAdam": [
        *ADAM,
        *every(
            momentum_decay=[0, 0.3], weight_decay=[0, 0.1], decoupled_weight_decay=[False, True], maximize=[False, True]
        ),
    ],
    # Rectified from the 6th step, at beta2 = 0.7 from the 10th.
    "RAdam": [
        *ADAM,
        {"betas": (0.9, 0.9), "eps": 0.1},
        *every(weight_decay=[0, 0.1], decoupled_weight_decay=[False, True], maximize=[False, True]),
    ],
    "RMSprop": [
        {},
        {"lr": halved_every_five, "momentum": falling_momentum, "alpha": 0.8, "eps": 1e-3},
        *every(momentum=[0, 0.9], centered=[False, True], weight_decay=[0, 0.1], maximize=[False, True]),
    ],
    # Under the last two the step sizes reach both bounds; lr = 0.5 begins outside of them.
    "Rprop": [
        *every(maximize=[False, True]),
        {"etas": (0.3, 3.0), "step_sizes": (1e-3, 0.1), "lr": 0.5},
        {"etas": (0.9, 1.1), "step_sizes": (0.009, 0.011), "lr": halved_every_five},
    ],
    "SparseAdam": [*every(maximize=[False, True]), {"lr": halved_every_five, "betas": falling_beta1, "eps": 0.1}],
    # The relative step is lr at every step unless lr is above 1 / sqrt(20).
    "Adafactor": [
        {},
        {"lr": halved_every_five, "weight_decay": shrinking, "beta2_decay": -0.5},
        {"lr": 0.5, "eps": (0.3, 1.0), "d": 1.5},
        *every(lr=[0.01, 1.0], weight_decay=[0, 0.1], d=[1.0, 1.1], maximize=[False, True]),
    ],
    "Muon": [
        {},
        {"lr": halved_every_five, "weight_decay": shrinking, "momentum": falling_momentum},
        {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "eps": 2.0},
        *every(nesterov=[False, True], weight_decay=[0, 0.1], adjust_lr_fn=["original", "match_rms_adamw"]),
    ],
}


def case_id(case):
    if isinstance(case, str):
        return case
    return " ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in case.items()) or "defaults"


def sparse(gradient, rng):
    """Half of it masked, and of the rest one in ten 0."""
    kind = rng.random(gradient.shape)
    return np.ma.array(np.where(kind > 0.95, 0, gradient), mask=kind < 0.5)


def random_problem(name):
    """Parameters and 20 steps of gradients: the first parameter has all, the others four in five."""
    rng = np.random.default_rng(0)
    # Shrinking, else the second moment only grows, and AMSGrad's maximum is always the newest.
    scale = 0.8 ** np.arange(STEPS)
    shapes = SHAPES[name]
    params = [rng.standard_normal(shape) for shape in shapes]
    grads = [
        [k * rng.standard_normal(s) if i == 0 or rng.random() > 0.2 else None for i, s in enumerate(shapes)]
        for k in scale
    ]
    if name in SPARSE:
        grads = [[g if g is None else sparse(g, rng) for g in step] for step in grads]
    return params, grads


def as_tensor(gradient):
    """A masked gradient as torch's sparse one, which may hold a 0."""
    if not isinstance(gradient, np.ma.MaskedArray):
        return torch.tensor(gradient)
    held = ~torch.tensor(np.ma.getmaskarray(gradient))
    values = torch.tensor(np.ma.getdata(gradient))
    return torch.sparse_coo_tensor(held.nonzero().T, values[held], values.shape, check_invariants=True)


def run_torch(name, params, grads, hyperparameters):
    """torch.optim's for-loop over the same steps."""
    now = {k: v(0) if callable(v) else v for k, v in hyperparameters.items()}
    tensors = [torch.nn.Parameter(torch.tensor(p)) for p in params]
    optimizer_class = getattr(torch.optim, name)
    if "foreach" in inspect.signature(optimizer_class).parameters:
        now["foreach"] = False
    optimizer = optimizer_class(tensors, **now)
    for index, step_grads in enumerate(grads):
        for k, v in hyperparameters.items():
            if callable(v):
                optimizer.param_groups[0][k] = v(index)
        for p, g in zip(tensors, step_grads, strict=True):
            p.grad = None if g is None else as_tensor(g)
        optimizer.step()
    return [p.detach().numpy() for p in tensors], [optimizer.state.get(p, {}) for p in tensors]


def assert_close(ours, theirs, what="parameter"):
    """To 1e-12, or to a few roundings of the largest element where cancellation brought one close to 0."""
    assert np.shape(ours) == np.shape(theirs), what
    atol = 1e-14 * np.max(np.abs(theirs), initial=0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=atol, err_msg=what)


@pytest.mark.parametrize(
    ("name", "hyperparameters"), [(n, c) for n, cases in CASES.items() for c in cases], ids=case_id
)
def test_agrees_with_torch(name, hyperparameters, monkeypatch):
    # torch's Muon iterates in bfloat16, through this method alone, and then writes into what it returns.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    params, grads = random_problem(name)
    ours, states = REFERENCES[name](params, grads, **hyperparameters)
    theirs, their_states = run_torch(name, params, grads, hyperparameters)
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p, q)
    for state, their_state in zip(states, their_states, strict=True):
        assert set(state) == set(their_state)
        for key, value in their_state.items():
            assert_close(state[key], np.asarray(value), key)


def test_muon_agrees_with_torchs_bfloat16():
    """bfloat16 has 8 bits, and five iterations multiply the rounding of the smallest singular values."""
    params, grads = random_problem("Muon")
    ours, _ = REFERENCES["Muon"](params, grads, weight_decay=0)
    theirs, _ = run_torch("Muon", params, grads, {"weight_decay": 0})
    for start, p, q in zip(params, ours, theirs, strict=True):
        assert np.linalg.norm(p - q) < 0.03 * np.linalg.norm(p - start)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6), (1, 1)], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_newton_schulz_maps_the_singular_values_alone(shape, steps):
    """x = U diag(s) V becomes U diag(f(...f(s / |x|))) V, with |x| the Frobenius norm."""
    a, b, c = coefficients = 3.4445, -4.775, 2.0315
    x = np.random.default_rng(0).standard_normal(shape)
    u, s, v = np.linalg.svd(x, full_matrices=False)
    s = s / np.linalg.norm(x)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    np.testing.assert_allclose(newton_schulz(x, coefficients, steps, 1e-7), u * s @ v, rtol=0, atol=1e-12)


def test_newton_schulz_converges_to_the_nearest_orthogonal_matrix():
    """With coefficients whose fixed point is 1 (Muon's trade that for speed) it is the polar factor U V."""
    x = np.random.default_rng(0).standard_normal((4, 6))
    u, _, v = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(newton_schulz(x, (15 / 8, -10 / 8, 3 / 8), 30, 1e-7), u @ v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_defaults_are_torchs(name):
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    keywords = getattr(REFERENCES[name], "keywords", {})  # AdamW's, over Adam's
    for key, argument in inspect.signature(REFERENCES[name]).parameters.items():
        if argument.default is not argument.empty and not (name == "AdamW" and key == "decoupled_weight_decay"):
            assert keywords.get(key, argument.default) == theirs[key].default, key


@pytest.mark.parametrize("name", [name for name in REFERENCES if not getattr(REFERENCES[name], "of_model", ())])
def test_missing_gradient_changes_nothing(name):
    """A parameter's trajectory depends on its own gradients alone, not on steps that it sat out."""
    params, grads = random_problem(name)
    for i, p in enumerate(params):
        own = [[step[i]] for step in grads if step[i] is not None]
        (together, states), (alone, (state,)) = REFERENCES[name](params, grads), REFERENCES[name]([p], own)
        np.testing.assert_array_equal(together[i], alone[0])
        for key in state:
            np.testing.assert_array_equal(states[i][key], state[key])
    _, (never,) = REFERENCES[name](params[:1], [[None]] * 3)
    assert never == {}


@pytest.mark.parametrize("name", REFERENCES)
def test_arguments_are_left_alone(name):
    (params, grads), fresh = random_problem(name), random_problem(name)
    new, _ = REFERENCES[name](params, grads)
    for arrays, same in zip([params, *grads], [fresh[0], *fresh[1]], strict=True):
        for a, b in zip(arrays, same, strict=True):
            np.testing.assert_array_equal(a, b)
    assert [(type(p), p.shape, p.dtype) for p in new] == [(np.ndarray, s, np.float64) for s in SHAPES[name]]


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="long double is no wider than double here")
@pytest.mark.parametrize("hyperparameters", [{}, {"betas": (0.9, 0.999)}], ids=["defaults", "given"])
def test_longdouble_passes_through_no_float64(hyperparameters):
    """Under a constant gradient Adam's corrected moments are g and g^2 exactly, at every step."""
    grads = [[np.full(1, 3.0)]] * STEPS
    (p,), _ = REFERENCES["Adam"]([np.zeros(1)], grads, dtype=np.longdouble, **hyperparameters)
    lr, eps, g = np.longdouble(1e-3), np.longdouble(1e-8), np.longdouble(3)
    assert p.dtype == np.longdouble
    # In longdouble 5e-19 off; 3e-16 with 1 - beta2 ** t in float64.
    assert abs(p[0] / (-STEPS * lr * g / (g + eps)) - 1) < 1e-17


@pytest.mark.parametrize("name", REFERENCES)
def test_every_state_is_in_the_given_dtype(name):
    """All but "step", a whole number."""
    params, grads = random_problem(name)
    new, states = REFERENCES[name](params, grads, dtype=np.longdouble)
    arrays = [*new, *(s for state in states for key, s in state.items() if key != "step")]
    assert {a.dtype for a in arrays} == {np.dtype(np.longdouble)}
