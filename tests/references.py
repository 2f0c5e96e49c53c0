"""What each of torch's optimizers should compute: written from the papers, in plain NumPy and float64.

Nothing here is shared with the package or with torch, so that a mistake of theirs can't be repeated here.
Speed does not matter. Every reference is called alike:

    params, states = adam(params, grads, lr=1e-2, betas=(0.9, 0.99), maximize=True)

    params   list of arrays, any shapes; never written to
    grads    one list for each step, as long as params; None leaves that parameter, and its step count, alone.
             A sparse gradient is a np.ma.MaskedArray: what it doesn't hold is masked, what it holds may be 0.
    further  torch's argument names and defaults for one parameter group; each a value, or a callable that
             takes the index of the step (from 0, counting every step) and returns one
    dtype    the arithmetic. np.longdouble, where it is wider, can judge float64 itself: there the rounding of
             a float64 reference is as large as the error that it is to measure.

It returns the new parameters, and for each parameter a dict with torch's state names. As in torch, the dict
is empty before the first gradient (but torch's Adagrad has its state from the start), and "step" is in it
only if torch keeps one.

A reference is the update of one parameter at one step. It gets the parameter p, the gradient g (negated already if
maximize) and the parameter's state, and returns the new p. It binds new arrays and never writes into old ones.
table/ has a row for each optimizer, with its reference; of an optimizer that torch lacks the reference stands there
or in references_more.py.
"""

import functools

import numpy as np
from references_runner import reference


@reference
def adam(
    p, g, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False,
    decoupled_weight_decay=False,
):  # fmt: skip
    """Kingma & Ba 2015, Algorithm 1, with both weight decays of Loshchilov & Hutter 2019, Algorithm 2.

    As torch documents it: the decoupled decay is multiplied by lr (the paper: by the schedule's factor only),
    and AMSGrad takes the maximum over the second moments before their bias correction (Reddi et al. 2018,
    Algorithm 2, has no bias correction).
    """
    b1, b2 = betas
    t = state["step"] = state.get("step", 0) + 1
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    if not decoupled_weight_decay:
        g, decay = g + decay, 0
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0) + (1 - b1) * g
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0) + (1 - b2) * g**2
    if amsgrad:
        v = state["max_exp_avg_sq"] = np.maximum(state.get("max_exp_avg_sq", 0), v)
    m_hat = m / (1 - b1**t)
    v_hat = v / (1 - b2**t)
    return p - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay)


# Loshchilov & Hutter 2019, Algorithm 2: their two algorithms differ in the place of the decay alone.
adamw = functools.partial(adam, weight_decay=1e-2, decoupled_weight_decay=True)


@reference
def sgd(p, g, state, lr=1e-3, momentum=0, dampening=0, weight_decay=0, nesterov=False):
    """Sutskever et al. 2013, section 2, in the form that torch documents.

    There lr multiplies the velocity, not the gradient in it, and the velocity starts as the first gradient,
    undamped, instead of 0. Steps with momentum 0 neither start the velocity nor change it.
    """
    if weight_decay != 0:
        g = g + weight_decay * p
    if momentum != 0:
        b = state.get("momentum_buffer")
        b = state["momentum_buffer"] = g if b is None else momentum * b + (1 - dampening) * g
        g = g + momentum * b if nesterov else b
    return p - lr * g


@reference
def adadelta(p, g, state, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0):
    """Zeiler 2012, Algorithm 1. torch's is multiplied by lr, and the decay is added to the gradient."""
    if weight_decay != 0:
        g = g + weight_decay * p
    state["step"] = state.get("step", 0) + 1
    v = state["square_avg"] = rho * state.get("square_avg", 0) + (1 - rho) * g**2
    u = state.get("acc_delta", 0)
    delta = np.sqrt(u + eps) / np.sqrt(v + eps) * g
    state["acc_delta"] = rho * u + (1 - rho) * delta**2
    return p - lr * delta


@reference
def adagrad(p, g, state, lr=1e-2, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10):
    """Duchi et al. 2011, Figure 1, the diagonal case. eps is outside of the root; lr's decay is torch's own."""
    if weight_decay != 0:
        g = g + weight_decay * p
    t = state["step"] = state.get("step", 0) + 1
    s = state["sum"] = state.get("sum", initial_accumulator_value) + g**2
    return p - lr * g / (1 + (t - 1) * lr_decay) / (np.sqrt(s) + eps)


@reference
def adamax(p, g, state, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0):
    """Kingma & Ba 2015, Algorithm 2, which has no eps: torch adds it to |g|, inside the maximum."""
    b1, b2 = betas
    if weight_decay != 0:
        g = g + weight_decay * p
    t = state["step"] = state.get("step", 0) + 1
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0) + (1 - b1) * g
    u = state["exp_inf"] = np.maximum(b2 * state.get("exp_inf", 0), np.abs(g) + eps)
    return p - lr / (1 - b1**t) * m / u


@reference
def asgd(p, g, state, lr=1e-2, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0):
    """Polyak & Juditsky 1992, with the schedule of Bottou's sgd: eta = lr / (1 + lambd lr t)^alpha.

    In torch a step uses the eta and mu that the step before it left, so that a change of lr is a step late. lambd
    is a decay multiplied by eta; weight_decay, apart from it, is added to the gradient.
    """
    if weight_decay != 0:
        g = g + weight_decay * p
    t = state["step"] = state.get("step", 0) + 1
    eta, mu = state.get("eta", lr), state.get("mu", 1)
    p = p - eta * (g + lambd * p)
    state["ax"] = p if mu == 1 else state["ax"] + mu * (p - state["ax"])
    state["eta"] = lr / (1 + lambd * lr * t) ** alpha
    state["mu"] = 1 / p.dtype.type(max(1, t - t0))
    return p


@reference
def nadam(
    p, g, state, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, momentum_decay=4e-3,
    decoupled_weight_decay=False,
):  # fmt: skip
    """Dozat 2016, with its schedule of mu (momentum_decay: 1/250 there).

    torch's first moment decays by the fixed beta1 (the paper: by mu of the step), and the decays are torch's own.
    """

    def mu(t):
        return b1 * (1 - p.dtype.type(0.96) ** (t * momentum_decay) / 2)

    b1, b2 = betas
    t = state["step"] = state.get("step", 0) + 1
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    if not decoupled_weight_decay:
        g, decay = g + decay, 0
    product = state["mu_product"] = state.get("mu_product", 1) * mu(t)
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0) + (1 - b1) * g
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0) + (1 - b2) * g**2
    m_hat = mu(t + 1) * m / (1 - product * mu(t + 1)) + (1 - mu(t)) * g / (1 - product)
    v_hat = v / (1 - b2**t)
    return p - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay)


@reference
def radam(p, g, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, decoupled_weight_decay=False):
    """Liu et al. 2020, Algorithm 2, which has no eps: torch adds it to the root of v before the bias correction.

    torch rectifies where rho > 5, as the authors' code does; the paper says 4.
    """
    b1, b2 = betas
    t = state["step"] = state.get("step", 0) + 1
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    if not decoupled_weight_decay:
        g, decay = g + decay, 0
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0) + (1 - b1) * g
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0) + (1 - b2) * g**2
    update = m / (1 - b1**t)
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
    if rho > 5:
        r = np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        update = update * r * np.sqrt(1 - b2**t) / (np.sqrt(v) + eps)
    return p - lr * (update + decay)


@reference
def rmsprop(p, g, state, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False):
    """Hinton's lecture 6e (2012); centered and with momentum: Graves 2013, equations 38 to 41.

    eps is outside of the root (Graves: inside), and lr multiplies the velocity, not the gradient in it.
    """
    if weight_decay != 0:
        g = g + weight_decay * p
    state["step"] = state.get("step", 0) + 1
    v = state["square_avg"] = alpha * state.get("square_avg", 0) + (1 - alpha) * g**2
    if centered:
        mean = state["grad_avg"] = alpha * state.get("grad_avg", 0) + (1 - alpha) * g
        v = v - mean**2
    update = g / (np.sqrt(v) + eps)
    if momentum > 0:
        update = state["momentum_buffer"] = momentum * state.get("momentum_buffer", 0) + update
    return p - lr * update


@reference
def rprop(p, g, state, lr=1e-2, etas=(0.5, 1.2), step_sizes=(1e-6, 50)):
    """Riedmiller & Braun 1993, in the form without backtracking: Igel & Huesken 2000, iRprop-.

    torch clips every step size at every step, the first of lr too. sign(NaN) is NaN (torch.sign says 0).
    """
    state["step"] = state.get("step", 0) + 1
    turn = np.sign(g) * np.sign(state.get("prev", 0))
    factor = np.where(turn > 0, etas[1], np.where(turn < 0, etas[0], 1))
    size = state["step_size"] = np.clip(state.get("step_size", lr) * factor, *step_sizes)
    g = state["prev"] = np.where(turn < 0, 0, g)
    return p - size * np.sign(g)


@reference
def sparse_adam(p, g, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
    """Kingma & Ba 2015, in the efficient form that ends section 2, on the elements that the gradient holds.

    The bias correction counts the steps of the whole parameter, and in this form eps is added before it.
    """
    b1, b2 = betas
    absent, g = np.ma.getmaskarray(g), np.ma.getdata(g)
    t = state["step"] = state.get("step", 0) + 1
    m, v = state.get("exp_avg", np.zeros_like(p)), state.get("exp_avg_sq", np.zeros_like(p))
    m = state["exp_avg"] = np.where(absent, m, b1 * m + (1 - b1) * g)
    v = state["exp_avg_sq"] = np.where(absent, v, b2 * v + (1 - b2) * g**2)
    update = np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
    return np.where(absent, p, p - lr * update)
