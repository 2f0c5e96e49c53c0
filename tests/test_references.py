"""The references themselves: against torch.optim in float64, and against numbers worked out by hand."""

import itertools

import numpy as np
import pytest
import torch
from references import REFERENCES, lion

STEPS = 20
SHAPES = [(5, 3), (7,), (), (0,)]


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


ADAM = [
    {},
    {"betas": (0.5, 0.7), "eps": 1e-3},
    {"lr": halved_every_five, "weight_decay": shrinking, "betas": falling_beta1},
]
ADAM_FLAGS = {"weight_decay": [0, 0.1], "amsgrad": [False, True], "maximize": [False, True]}

# Every combination that the class accepts: Nesterov momentum excludes dampening and needs momentum.
CASES = {
    "Adam": [*ADAM, *every(**ADAM_FLAGS, decoupled_weight_decay=[False, True])],
    "AdamW": [*ADAM, *every(**ADAM_FLAGS)],
    "SGD": [
        {},
        *every(momentum=[0, 0.9], dampening=[0, 0.3], weight_decay=[0, 0.1], maximize=[False, True]),
        *every(momentum=[0.9], nesterov=[True], weight_decay=[0, 0.1], maximize=[False, True]),
        {"lr": halved_every_five, "momentum": momentum_on_and_off, "dampening": 0.3},
    ],
}


def case_id(case):
    if isinstance(case, str):
        return case
    return " ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in case.items()) or "defaults"


def random_problem():
    """Parameters and 20 steps of gradients: the first parameter has all, the others four in five."""
    rng = np.random.default_rng(0)
    # Shrinking, else the second moment only grows, and AMSGrad's maximum is always the newest.
    scale = 0.8 ** np.arange(STEPS)
    params = [rng.standard_normal(shape) for shape in SHAPES]
    grads = [
        [k * rng.standard_normal(s) if i == 0 or rng.random() > 0.2 else None for i, s in enumerate(SHAPES)]
        for k in scale
    ]
    return params, grads


def run_torch(name, params, grads, hyperparameters):
    """torch.optim's for-loop over the same steps."""
    now = {k: v(0) if callable(v) else v for k, v in hyperparameters.items()}
    tensors = [torch.nn.Parameter(torch.tensor(p)) for p in params]
    optimizer = getattr(torch.optim, name)(tensors, foreach=False, **now)
    for index, step_grads in enumerate(grads):
        for k, v in hyperparameters.items():
            if callable(v):
                optimizer.param_groups[0][k] = v(index)
        for p, g in zip(tensors, step_grads, strict=True):
            p.grad = None if g is None else torch.tensor(g)
        optimizer.step()
    return [p.detach().numpy() for p in tensors], [optimizer.state.get(p, {}) for p in tensors]


def assert_close(ours, theirs, what="parameter"):
    """To 1e-12, or to a few roundings of the largest element where cancellation brought one close to 0."""
    atol = 1e-14 * np.max(np.abs(theirs), initial=0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=atol, err_msg=what)


@pytest.mark.parametrize(
    ("name", "hyperparameters"), [(n, c) for n, cases in CASES.items() for c in cases], ids=case_id
)
def test_agrees_with_torch(name, hyperparameters):
    params, grads = random_problem()
    ours, states = REFERENCES[name](params, grads, **hyperparameters)
    theirs, their_states = run_torch(name, params, grads, hyperparameters)
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p, q)
    for state, their_state in zip(states, their_states, strict=True):
        assert set(state) == set(their_state)
        for key, value in their_state.items():
            assert_close(state[key], value.numpy(), key)


@pytest.mark.parametrize("maximize", [False, True])
def test_lion_by_hand(maximize):
    """Two steps from p = 1, with lr = 0.1, betas = (0.9, 0.5), weight_decay = 0.5.

    step 1, g = 2:    c = 0.9 * 0 + 0.1 * 2 = 0.2          sign +1
                      p = 1 - 0.1 * (1 + 0.5 * 1) = 0.85
                      m = 0.5 * 0 + 0.5 * 2 = 1
    step 2, g = -4:   c = 0.9 * 1 + 0.1 * -4 = 0.5         sign +1; the sign of g, and of the new m, is -1
                      p = 0.85 - 0.1 * (1 + 0.5 * 0.85) = 0.7075
                      m = 0.5 * 1 + 0.5 * -4 = -1.5
    A second element has g = -2, then 18.5: c = -0.2, then 0.9 * -1 + 0.1 * 18.5 = 0.95.
                      p = 1 - 0.1 * (-1 + 0.5) = 1.05, then 1.05 - 0.1 * (1 + 0.525) = 0.8975
                      m = -1, then 0.5 * -1 + 0.5 * 18.5 = 8.75
    A third has no gradient but 0, and only decays: p = 0.95, then 0.9025.
    """
    grads = [np.array([2.0, -2.0, 0.0]), np.array([-4.0, 18.5, 0.0])]
    grads = [[-g if maximize else g] for g in grads]
    h = {"lr": 0.1, "betas": (0.9, 0.5), "weight_decay": 0.5, "maximize": maximize}

    (p,), (state,) = lion([np.ones(3)], grads[:1], **h)
    np.testing.assert_allclose(p, [0.85, 1.05, 0.95], rtol=1e-15)
    np.testing.assert_allclose(state["exp_avg"], [1.0, -1.0, 0.0], rtol=1e-15)

    (p,), (state,) = lion([np.ones(3)], grads, **h)
    np.testing.assert_allclose(p, [0.7075, 0.8975, 0.9025], rtol=1e-15)
    np.testing.assert_allclose(state["exp_avg"], [-1.5, 8.75, 0.0], rtol=1e-15)
    assert list(state) == ["exp_avg"]


def test_lion_defaults():
    """lr = 1e-4, betas = (0.9, 0.99), no decay.

    g = 1:    c = 0.1                               p = 1 - 1e-4         m = 0.01
    g = -1:   c = 0.9 * 0.01 - 0.1 = -0.091         p = 1                m = 0.99 * 0.01 - 0.01 = -1e-4
    """
    (p,), (state,) = lion([np.ones(1)], [[np.ones(1)]])
    np.testing.assert_allclose(p, [0.9999], rtol=1e-15)
    np.testing.assert_allclose(state["exp_avg"], [0.01], rtol=1e-14)  # 1 - 0.99 is 9e-16 off
    (p,), (state,) = lion([np.ones(1)], [[np.ones(1)], [-np.ones(1)]])
    np.testing.assert_allclose(p, [1.0], rtol=1e-15)
    np.testing.assert_allclose(state["exp_avg"], [-1e-4], rtol=1e-12)


@pytest.mark.parametrize("name", REFERENCES)
def test_missing_gradient_changes_nothing(name):
    """A parameter's trajectory depends on its own gradients alone, not on steps that it sat out."""
    params, grads = random_problem()
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
    (params, grads), fresh = random_problem(), random_problem()
    new, _ = REFERENCES[name](params, grads)
    for arrays, same in zip([params, *grads], [fresh[0], *fresh[1]], strict=True):
        for a, b in zip(arrays, same, strict=True):
            np.testing.assert_array_equal(a, b)
    assert [(type(p), p.shape, p.dtype) for p in new] == [(np.ndarray, s, np.float64) for s in SHAPES]


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
