"""The references against numbers worked out by hand. Where no p is given, it starts as 1."""

import numpy as np
import pytest
import torch
from table import CASES, REFERENCES, each_case

RTOL = 1e-14


def after(name, grads, p=1.0, **hyperparameters):
    """The parameter and its state after these gradients."""
    (p,), (state,) = REFERENCES[name]([np.asarray(p)], [[np.asanyarray(g)] for g in grads], **hyperparameters)
    return p, state


def close(ours, worked_out):
    np.testing.assert_allclose(ours, worked_out, rtol=RTOL)


BY_HAND = [(case, steps) for case in CASES for steps in case.by_hand]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("case", "steps"), BY_HAND, ids=[f"{case.name}-{len(s.gradients)}" for case, s in BY_HAND])
def test_rows(case, steps, maximize):
    grads = [-np.asarray(g) if maximize else g for g in steps.gradients]
    p, state = after(case.name, grads, np.ones(np.shape(grads[0])), **steps.options, maximize=maximize)
    found = {"p": p, **state}
    assert found.keys() >= steps.after.keys()
    for name, value in steps.after.items():
        # What is 0 by hand may be what cancels.
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-14, err_msg=name)


@each_case
def test_every_reference_is_compared_with_something(case):
    """With torch's, in test_references.py, or by hand, twice: more than one step, more than the defaults."""
    by_hand = any(len(steps.gradients) > 1 for steps in case.by_hand) and any(steps.options for steps in case.by_hand)
    assert case.torchs or by_hand, "give the row a by_hand with a ByHand of more than one gradient and one with options"


@each_case
def test_a_row_says_which_states_are_numbers(case):
    (p,) = params = case.parameters(shapes=((4, 3),))
    opt = case.ours(params, **case.settings, backend="eager")
    p.grad = case.gradient(p, torch.Generator().manual_seed(0))
    opt.step()
    found = {name: x.dtype for name, x in opt.state[p].items() if isinstance(x, torch.Tensor) and not x.dim()}
    said = {name: dtype for name, dtype in case.numbers.items() if name in found or name != "step"}
    assert found == said, f"give the row numbers={ {n: d for n, d in found.items() if n != 'step'} }"


def test_adadelta_by_hand():
    """lr = 0.3, rho = 0.5, eps = 0.25.

    g = 2:    v = 0.5 * 4 = 2             delta = sqrt(0 + 0.25) / sqrt(2 + 0.25) * 2 = 2 / 3
              u = 0.5 * 4 / 9 = 2 / 9     p = 1 - 0.3 * 2 / 3 = 0.8
    g = -4:   v = 1 + 8 = 9               delta = sqrt(2 / 9 + 1 / 4) / sqrt(9.25) * -4, with the old u
              u = 1 / 9 + 0.5 * delta^2 = 1 / 9 + 8 * (17 / 36) / 9.25
    """
    h = {"lr": 0.3, "rho": 0.5, "eps": 0.25}
    p, state = after("Adadelta", [2.0], **h)
    close([p, state["square_avg"], state["acc_delta"]], [0.8, 2, 2 / 9])
    p, state = after("Adadelta", [2.0, -4.0], **h)
    close([p, state["square_avg"]], [0.8 + 0.3 * 4 * np.sqrt(17 / 36 / 9.25), 9])
    close(state["acc_delta"], 1 / 9 + 34 / 83.25)
    assert state["step"] == 2


def test_adagrad_by_hand():
    """lr = 0.1, lr_decay = 0.5, a sum that starts at 9, eps = 1.

    g = 4:    sum = 9 + 16 = 25        p = 1 - 0.1 * 4 / (5 + 1) = 14 / 15
    g = 12:   sum = 25 + 144 = 169     p = 14 / 15 - 0.1 / 1.5 * 12 / (13 + 1) = 92 / 105
    """
    h = {"lr": 0.1, "lr_decay": 0.5, "initial_accumulator_value": 9.0, "eps": 1.0}
    close(after("Adagrad", [4.0], **h)[0], 14 / 15)
    p, state = after("Adagrad", [4.0, 12.0], **h)
    close([p, state["sum"], state["step"]], [92 / 105, 169, 2])


def test_adamax_by_hand():
    """lr = 0.1, betas = (0.5, 0.5), eps = 1.

    g = 3:      m = 1.5                  u = max(0, 3 + 1) = 4       p = 1 - 0.1 / 0.5 * 1.5 / 4 = 0.925
    g = -0.5:   m = 0.75 - 0.25 = 0.5    u = max(2, 0.5 + 1) = 2     p = 0.925 - 0.1 / 0.75 * 0.5 / 2
    """
    h = {"lr": 0.1, "betas": (0.5, 0.5), "eps": 1.0}
    close(after("Adamax", [3.0], **h)[0], 0.925)
    p, state = after("Adamax", [3.0, -0.5], **h)
    close([p, state["exp_avg"], state["exp_inf"]], [0.925 - 1 / 30, 0.5, 2])


def test_asgd_by_hand():
    """lr = 0.5, lambd = 2, alpha = 1, t0 = 1.

    g = 1:   p = (1 - 2 * 0.5) * 1 - 0.5 * 1 = -0.5            ax = p      then eta = 0.5 / (1 + 1) = 0.25, mu = 1
    g = 2:   p = (1 - 2 * 0.25) * -0.5 - 0.25 * 2 = -0.75      ax = p      then eta = 0.5 / (1 + 2) = 1/6, mu = 1
    g = 0:   p = (1 - 2 / 6) * -0.75 = -0.5                    ax = p      then eta = 0.5 / (1 + 3) = 1/8, mu = 1/2
    g = 0:   p = (1 - 2 / 8) * -0.5 = -0.375     ax = -0.5 + 0.125 / 2     then eta = 0.5 / (1 + 4) = 0.1, mu = 1/3
    """
    h = {"lr": 0.5, "lambd": 2.0, "alpha": 1.0, "t0": 1.0}
    p, state = after("ASGD", [1.0, 2.0, 0.0], **h)
    close([p, state["ax"], state["eta"], state["mu"]], [-0.5, -0.5, 0.125, 0.5])
    p, state = after("ASGD", [1.0, 2.0, 0.0, 0.0], **h)
    close([p, state["ax"], state["eta"], state["mu"]], [-0.375, -0.4375, 0.1, 1 / 3])


def test_nadam_by_hand():
    """lr = 0.1, betas = (0.8, 0.75), eps = 1, momentum_decay = 1.

    mu_1 = 0.8 * (1 - 0.96 / 2) = 0.416,    mu_2 = 0.8 * (1 - 0.96^2 / 2) = 0.43136
    g = 2:   m = 0.2 * 2 = 0.4,   v = 0.25 * 4 = 1,   v_hat = 4
             m_hat = mu_2 * 0.4 / (1 - mu_1 mu_2) + (1 - mu_1) * 2 / (1 - mu_1)
             p = 1 - 0.1 * m_hat / (2 + 1)
    """
    p, state = after("NAdam", [2.0], lr=0.1, betas=(0.8, 0.75), eps=1.0, momentum_decay=1.0)
    close(p, 1 - 0.1 * (0.172544 / (1 - 0.17944576) + 2) / 3)
    close([state["mu_product"], state["exp_avg"], state["exp_avg_sq"]], [0.416, 0.4, 1])


def test_radam_by_hand():
    """lr = 0.1, betas = (0.5, 0.75), eps = 0 and g = 2 throughout, so m_hat = 2 and v_hat = 4.

    rho_inf = 2 / 0.25 - 1 = 7, and rho = 7 - 2 t 0.75^t / (1 - 0.75^t) is 4.84 at step 7, not yet above 5:
    p = 1 - 7 * 0.1 * 2 = -0.4. At step 8 it is 7 - 16 * 6561 / 58975 = 307849 / 58975, above 5:
    p = -0.4 - 0.1 * r * 2 / sqrt(4).
    """
    h = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 0.0}
    close(after("RAdam", [2.0] * 7, **h)[0], -0.4)
    rho = 307849 / 58975
    close(after("RAdam", [2.0] * 8, **h)[0], -0.4 - 0.1 * np.sqrt((rho - 4) * (rho - 2) * 7 / (3 * 5 * rho)))
    # With eps = 1 the root of v is v_hat's times sqrt(1 - 0.75^8), and eps is added to that.
    root = np.sqrt(58975 / 65536)
    r = np.sqrt((rho - 4) * (rho - 2) * 7 / (3 * 5 * rho))
    close(after("RAdam", [2.0] * 8, **h | {"eps": 1.0})[0], -0.4 - 0.1 * r * 2 * root / (2 * root + 1))


def test_rmsprop_by_hand():
    """lr = 0.1, eps = 1.

    alpha = 0.75, g = 4:   v = 0.25 * 16 = 4      p = 1 - 0.1 * 4 / (2 + 1)
    alpha = 0.5, momentum = 0.5, centered:
    g = 2:                 v = 2, mean = 1,       sqrt(2 - 1) = 1,             b = 2 / (1 + 1) = 1
                           p = 1 - 0.1 = 0.9
    g = 1.5:               v = 1 + 1.125 = 2.125, mean = 0.5 + 0.75 = 1.25,    sqrt(2.125 - 1.5625) = 0.75
                           b = 0.5 + 1.5 / (0.75 + 1) = 19 / 14                p = 0.9 - 0.1 * 19 / 14
    """
    close(after("RMSprop", [4.0], lr=0.1, alpha=0.75, eps=1.0)[0], 1 - 0.4 / 3)
    p, state = after("RMSprop", [2.0, 1.5], lr=0.1, alpha=0.5, eps=1.0, momentum=0.5, centered=True)
    close(p, 0.9 - 1.9 / 14)
    close([state["square_avg"], state["grad_avg"], state["momentum_buffer"]], [2.125, 1.25, 19 / 14])


def test_rprop_by_hand():
    """lr = 0.5, etas = (0.5, 2), step_sizes = (0.4, 1.5).

    g = 3:    nothing to compare with: size 0.5      p = 1 - 0.5 = 0.5
    g = 1:    the same sign: size 1                  p = -0.5
    g = 1:    2, bounded by 1.5                      p = -2
    g = -5:   a turn: size 0.75, no step             p = -2, and prev = 0
    g = -5:   prev is 0: size 0.75                   p = -1.25
    g = 5:    a turn: 0.375, bounded by 0.4          p = -1.25
    """
    h = {"lr": 0.5, "etas": (0.5, 2.0), "step_sizes": (0.4, 1.5)}
    grads, ps, sizes = (
        [3.0, 1.0, 1.0, -5.0, -5.0, 5.0],
        [0.5, -0.5, -2, -2, -1.25, -1.25],
        [0.5, 1, 1.5, 0.75, 0.75, 0.4],
    )
    for steps, worked_out in enumerate(zip(ps, sizes, [3, 1, 1, 0, -5, 0], strict=True), start=1):
        p, state = after("Rprop", grads[:steps], **h)
        close([p, state["step_size"], state["prev"]], worked_out)
    assert after("Rprop", [3.0], **h | {"lr": 7.0})[0] == -0.5  # lr too is bounded by 1.5


def test_sparse_adam_by_hand():
    """lr = 0.1, betas = (0.5, 0.75), eps = 1: step 1 holds the first element alone, step 2 the second.

    g = 2 at step 1:   m = 1, v = 0.25 * 4 = 1     p = 1 - 0.1 * sqrt(0.25) / 0.5 * 1 / (1 + 1) = 0.95
    g = 2 at step 2:   m = 1, v = 1                p = 1 - 0.1 * sqrt(0.4375) / 0.75 * 1 / (1 + 1)
    """
    grads = [np.ma.array([2.0, 2.0, 2.0], mask=m) for m in ([0, 1, 1], [1, 0, 1])]
    p, state = after("SparseAdam", grads, p=np.ones(3), lr=0.1, betas=(0.5, 0.75), eps=1.0)
    close(p, [0.95, 1 - 0.1 * np.sqrt(0.4375) / 1.5, 1])
    close([state["exp_avg"], state["exp_avg_sq"]], [[1, 1, 0]] * 2)
    assert state["step"] == 2
    assert type(p) is type(state["exp_avg"]) is np.ndarray


def test_adafactor_of_a_matrix_by_hand():
    """p = 2 in all elements, lr = 0.1, beta2_decay = -1, d = 2, weight_decay = 0.5.

    g = [[1, 2], [2, 4]]:   row = col = (2.5, 10), mean 6.25: the estimate is g^2, and the update 1 everywhere
                            p = (1 - 0.1 * 0.5) * 2 - rms(p) * 0.1 * 1 = 1.9 - 0.2 = 1.7
    2 g, with beta2 = 1/2:  row = col = (6.25, 25): the estimate is 2.5 g^2, the update 2 / sqrt(2.5) < d
                            p = 0.95 * 1.7 - 1.7 * 0.1 * 2 / sqrt(2.5)
    """
    g = np.array([[1.0, 2.0], [2.0, 4.0]])
    h = {"p": np.full((2, 2), 2.0), "lr": 0.1, "beta2_decay": -1.0, "d": 2.0, "weight_decay": 0.5}
    p, state = after("Adafactor", [g], **h)
    close(p, np.full((2, 2), 1.7))
    close(state["row_var"], [[2.5], [10]])
    p, state = after("Adafactor", [g, 2 * g], **h)
    close(p, np.full((2, 2), 1.7 * (0.95 - 0.2 / np.sqrt(2.5))))
    close(state["row_var"], [[6.25], [25]])
    close(state["col_var"], [[6.25, 25]])


def test_adafactor_of_a_vector_by_hand():
    """p = (3, 4), whose rms is sqrt(12.5), and lr = 5, bounded by 1 / sqrt(step).

    g = (1, 7):             update (1, 1), its rms 1, so clipped by d = 0.5: p = (3, 4) - sqrt(12.5) * 0.5
    the same, eps1 = 2:     update (1 / 2, 7 / 7), its rms sqrt(1.25 / 2), not clipped by d = 1
    p = 0, eps2 = 0.2:      p = -0.2 * (1, 1)
    """
    h = {"lr": 5.0, "d": 0.5}
    close(after("Adafactor", [[1.0, 7.0]], p=[3.0, 4.0], **h)[0], np.array([3, 4]) - np.sqrt(12.5) / 2)
    p, state = after("Adafactor", [[1.0, 7.0]], p=[3.0, 4.0], lr=5.0, eps=(2.0, 1e-3))
    close(p, np.array([3, 4]) - np.sqrt(12.5) * np.array([0.5, 1]))
    close(state["variance"], [1, 49])
    close(after("Adafactor", [[1.0, 7.0]], p=[0.0, 0.0], lr=5.0, eps=(None, 0.2))[0], [-0.2, -0.2])


@pytest.mark.parametrize(("adjust_lr_fn", "scale"), [(None, 2), ("original", 2), ("match_rms_adamw", 0.2 * 8**0.5)])
def test_muon_by_hand(adjust_lr_fn, scale):
    """p = 1 in 8 rows and 2 columns, lr = 0.1, weight_decay = 0.5, one iteration 1.5 s - 0.5 s^3.

    g has 3 and 4 on its diagonal. The momentum scales it (b = 0.5 g, the update 0.75 g) and is normalized away:
    s = 3 / 5 and 4 / 5 become 0.9 - 0.108 = 0.792 and 1.2 - 0.256 = 0.944.
    p = 0.95 - 0.1 * scale * those, the scale sqrt(8 / 2) or 0.2 * sqrt(8), and the decay not scaled.
    """
    g, o = np.zeros((2, 8, 2))
    g[0, 0], g[1, 1], o[0, 0], o[1, 1] = 3, 4, 0.792, 0.944
    h = {"lr": 0.1, "weight_decay": 0.5, "momentum": 0.5, "ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 1}
    p, state = after("Muon", [g], p=np.ones((8, 2)), adjust_lr_fn=adjust_lr_fn, **h)
    close(p, 0.95 - 0.1 * scale * o)
    close(state["momentum_buffer"], g / 2)
    assert list(state) == ["momentum_buffer"]
    # A wide one is not scaled by its shape, except to match AdamW's.
    p, _ = after("Muon", [g.T], p=np.ones((2, 8)), adjust_lr_fn=adjust_lr_fn, **h)
    close(p, 0.95 - 0.1 * (1 if scale == 2 else scale) * o.T)
