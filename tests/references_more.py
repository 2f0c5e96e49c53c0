"""The references of optimizers that torch lacks and whose update is elementwise, each written from its paper.

references.py says how they are called. table/ has steps of each that were worked out by hand.
"""

import numpy as np
from references_runner import reference


def average(state, name, beta, new):
    """A state that is an exponential moving average from 0 on."""
    state[name] = beta * state.get(name, 0) + (1 - beta) * new
    return state[name]


def decayed(p, factor):
    """A factor times the parameter. 0 leaves no trace of it, though 0 * Inf would be NaN."""
    return factor * p if factor != 0 else 0


@reference
def adan(p, g, state, lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0, no_prox=False):
    """Xie et al. 2022, Algorithm 1, with the authors' bias corrections. Its betas are 1 less these."""
    b1, b2, b3 = betas
    t = state["step"] = state.get("step", 0) + 1
    diff = g - state["previous_grad"] if "previous_grad" in state else np.zeros_like(g)
    state["previous_grad"] = g
    m = average(state, "exp_avg", b1, g) / (1 - b1**t)
    v = average(state, "exp_avg_diff", b2, diff) / (1 - b2**t)
    n = average(state, "exp_avg_sq", b3, (g + b2 * diff) ** 2) / (1 - b3**t)
    update = lr * (m + b2 * v) / (np.sqrt(n) + eps)
    if no_prox:
        return p - decayed(p, lr * weight_decay) - update
    return (p - update) / (1 + lr * weight_decay)


def warm(start, end, t, warmup):
    """The beta of a mean whose half-life, ln(1/2) / ln(beta), grows linearly in so many steps."""
    if warmup is None or t >= warmup:
        return end
    done = t / warmup
    return np.exp(np.log(start) * np.log(end) / ((1 - done) * np.log(end) + done * np.log(start)))


@reference
def ademamix(
    p, g, state, lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=2.0, beta3_warmup=None, alpha_warmup=None, eps=1e-8,
    weight_decay=0.0,
):  # fmt: skip
    """Pagliardini et al. 2024, Algorithm 1, with the schedules of its section 3."""
    b1, b2, b3 = betas
    t = state["step"] = state.get("step", 0) + 1
    alpha = alpha if alpha_warmup is None else alpha * min(t / alpha_warmup, 1)
    fast = average(state, "exp_avg_fast", b1, g) / (1 - b1**t)
    slow = average(state, "exp_avg_slow", warm(b1, b3, t, beta3_warmup), g)
    v = average(state, "exp_avg_sq", b2, g**2) / (1 - b2**t)
    return p - lr * ((fast + alpha * slow) / (np.sqrt(v) + eps) + decayed(p, weight_decay))


@reference
def simplified_ademamix(
    p, g, state, lr=1e-4, betas=(0.99, 0.95), alpha=0.0, beta1_warmup=None, eps=1e-8, weight_decay=0.0, min_beta1=0.9,
    bias_correction1=False, bias_correction2=True,
):  # fmt: skip
    """Morwani et al. 2025, Algorithm 1, with the authors' warm-up and corrections: each divides by a sum of weights."""
    b1, b2 = betas
    t = state["step"] = state.get("step", 0) + 1
    b1 = warm(min_beta1, b1, t, beta1_warmup)
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0) + g
    weights = state["num_sum"] = b1 * state.get("num_sum", 0) + 1
    v = average(state, "exp_avg_sq", b2, g**2)
    of_v = 1 - b2**t
    update = (alpha * g + m) / (np.sqrt(v) + eps * np.sqrt(of_v))
    if bias_correction1:
        update = update / weights
    if bias_correction2:
        update = update * np.sqrt(of_v)
    return p - lr * (update + decayed(p, weight_decay))


@reference
def adopt(
    p, g, state, lr=1e-3, betas=(0.9, 0.9999), eps=1e-6, clip_exp=0.25, weight_decay=0.0, decoupled_weight_decay=False
):
    """Taniguchi et al. 2024, Algorithm 2; the bound and both decays as in the authors' code."""
    b1, b2 = betas
    t = state["step"] = state.get("step", 0) + 1
    if not decoupled_weight_decay:
        g = g + decayed(p, weight_decay)
    if t == 1:
        state["exp_avg"], state["exp_avg_sq"] = np.zeros_like(g), g**2
        return p
    update = g / np.maximum(np.sqrt(state["exp_avg_sq"]), eps)
    if clip_exp is not None:
        bound = p.dtype.type(t - 1) ** clip_exp
        update = np.clip(update, -bound, bound)
    m = average(state, "exp_avg", b1, update)
    average(state, "exp_avg_sq", b2, g**2)
    return p - (decayed(p, lr * weight_decay) if decoupled_weight_decay else 0) - lr * m


@reference
def nadamw(p, g, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    """Dahl et al. 2023, AlgoPerf's NAdamW: AdamW with a Nesterov step on the first moment."""
    b1, b2 = betas
    t = state["step"] = state.get("step", 0) + 1
    m = b1 * average(state, "exp_avg", b1, g) + (1 - b1) * g
    v = average(state, "exp_avg_sq", b2, g**2)
    return p - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decayed(p, weight_decay))


@reference
def adam_atan2(p, g, state, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, a=1.27, b=1.0):
    """Everett et al. 2024: Adam's quotient of corrected moments as an angle, with no eps; decay before the step."""
    b1, b2 = betas
    t = state["step"] = state.get("step", 0) + 1
    m = average(state, "exp_avg", b1, g) / (1 - b1**t)
    v = average(state, "exp_avg_sq", b2, g**2) / (1 - b2**t)
    return p - decayed(p, lr * weight_decay) - lr * a * np.arctan2(m, b * np.sqrt(v))


@reference
def laprop(p, g, state, lr=4e-4, betas=(0.9, 0.999), eps=1e-15, weight_decay=0.0):
    """Ziyin et al. 2020, Algorithm 1; as in the authors' code lr is in the mean, and the decay comes last."""
    b1, b2 = betas
    t = state["step"] = state.get("step", 0) + 1
    v = average(state, "exp_avg_sq", b2, g**2) / (1 - b2**t)
    m = average(state, "exp_avg", b1, lr * g / (np.sqrt(v) + eps))
    c = average(state, "exp_avg_lr", b1, lr)
    p = p - (m * (lr / c) if lr != 0 else 0 * m)
    return p - decayed(p, lr * weight_decay)


@reference
def adabelief(
    p, g, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.0, decoupled_weight_decay=True
):  # fmt: skip
    """Zhuang et al. 2020, Algorithm 2: eps is added to the variance that is kept, and to its root."""
    b1, b2 = betas
    t = state["step"] = state.get("step", 0) + 1
    decay = decayed(p, weight_decay)
    if not decoupled_weight_decay:
        g, decay = g + decay, 0
    m = average(state, "exp_avg", b1, g)
    s = state["exp_avg_var"] = average(state, "exp_avg_var", b2, (g - m) ** 2) + eps
    return p - lr * (m / (1 - b1**t) / (np.sqrt(s / (1 - b2**t)) + eps) + decay)


def sign(x):
    """As torch.sign, 0 of NaN."""
    return np.where(np.isnan(x), 0, np.sign(x))


@reference
def signum(p, g, state, lr=1e-3, momentum=0.9, weight_decay=0.0):
    """Bernstein et al. 2018, Algorithm 2, and Algorithm 1 without momentum; the decay is AdamW's."""
    m = average(state, "exp_avg", momentum, g) if momentum != 0 else g
    return p - lr * (sign(m) + decayed(p, weight_decay))


@reference
def tiger(p, g, state, lr=1e-3, beta=0.965, weight_decay=1e-2):
    """Su 2023, https://github.com/bojone/tiger, with one learning rate for all."""
    m = average(state, "exp_avg", beta, g)
    return p - lr * (sign(m) + decayed(p, weight_decay))


@reference
def grams(p, g, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
    """Cao et al. 2024, Algorithm 1: Adam's update with the signs of the gradient."""
    b1, b2 = betas
    t = state["step"] = state.get("step", 0) + 1
    m = average(state, "exp_avg", b1, g) / (1 - b1**t)
    v = average(state, "exp_avg_sq", b2, g**2) / (1 - b2**t)
    update = sign(g) * np.abs(m / (np.sqrt(v) + eps))
    return p - lr * (update + decayed(p, weight_decay))


@reference
def adamc(p, g, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, max_lr=None):
    """Defazio 2025, Algorithm 1. Without max_lr it is for a learning rate that does not change."""
    b1, b2 = betas
    t = state["step"] = state.get("step", 0) + 1
    m = average(state, "exp_avg", b1, g) / (1 - b1**t)
    v = average(state, "exp_avg_sq", b2, g**2) / (1 - b2**t)
    decay = decayed(p, lr / (lr if max_lr is None else max_lr) * weight_decay)
    return p - lr * (m / (np.sqrt(v) + eps) + decay)


@reference
def sophia(p, g, state, lr=1e-4, betas=(0.965, 0.99), rho=0.04, weight_decay=1e-1, bs=5120):
    """Liu et al. 2023, Algorithm 3, with the authors' 1e-15 for its maximum."""
    h = state.setdefault("hessian", np.zeros_like(p))
    m = average(state, "exp_avg", betas[0], g)
    update = sign(m) * np.minimum(np.abs(m) / (rho * bs * h + 1e-15), 1)
    return p - lr * (update + decayed(p, weight_decay))


def sophia_estimate(p, g, state, betas=(0.965, 0.99)):
    """Liu et al. 2023, Algorithm 2: what the state becomes after a gradient of sampled labels."""
    state.setdefault("exp_avg", np.zeros_like(p))
    average(state, "hessian", betas[1], g**2)


def free_of_schedule(p, state, u, lr, b1, r, weight_lr_power):
    """Defazio et al. 2024, Algorithm 1, with x taken out of it: y = (1 - b1) z + b1 x is the parameter, z the state.

    A step of the learning rate lr along u, which was found at y. The weight of its z in the mean x is k^r times a power
    of the largest learning rate so far.
    """
    k, z = state["step"], state.get("z", p)
    state["lr_max"] = max(lr, state.get("lr_max", 0.0))
    weight = k**r * state["lr_max"] ** weight_lr_power
    state["weight_sum"] = state.get("weight_sum", 0.0) + weight
    c = weight / state["weight_sum"] if state["weight_sum"] != 0 else 0.0
    state["z"] = z - lr * u
    return p + c * (z - p) - lr * (1 - b1 * (1 - c)) * u


@reference
def schedule_free_adamw(
    p, g, state, lr=0.0025, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup_steps=0, r=0.0, weight_lr_power=2.0,
    train_mode=True,
):  # fmt: skip
    """Defazio et al. 2024, Algorithm 1, in the form of the authors' package: the decay is at y."""
    b1, b2 = betas
    t = state["step"] = state.get("step", 0) + 1
    v = average(state, "exp_avg_sq", b2, g**2) / (1 - b2**t)
    u = g / (np.sqrt(v) + eps) + decayed(p, weight_decay)
    lr = lr * t / warmup_steps if t < warmup_steps else lr
    return free_of_schedule(p, state, u, lr, b1, r, weight_lr_power)


@reference
def schedule_free_sgd(
    p, g, state, lr=1.0, momentum=0.9, weight_decay=0.0, warmup_steps=0, r=0.0, weight_lr_power=2.0, train_mode=True
):  # fmt: skip
    """Defazio et al. 2024, Algorithm 1, of SGD."""
    t = state["step"] = state.get("step", 0) + 1
    lr = lr * t / warmup_steps if t < warmup_steps else lr
    return free_of_schedule(p, state, g + decayed(p, weight_decay), lr, momentum, r, weight_lr_power)


@reference
def schedule_free_radam(
    p, g, state, lr=0.0025, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, r=0.0, weight_lr_power=2.0,
    silent_sgd_phase=True, train_mode=True,
):  # fmt: skip
    """Defazio et al. 2024, Algorithm 1, with the rectification of Liu et al. 2020 as the learning rate's factor."""
    b1, b2 = betas
    t = state["step"] = state.get("step", 0) + 1
    v = average(state, "exp_avg_sq", b2, g**2) / (1 - b2**t)
    longest = 2 / (1 - b2) - 1
    rho = longest - 2 * t * b2**t / (1 - b2**t)
    if rho > 4:
        lr = lr * np.sqrt((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho))
        g = g / (np.sqrt(v) + eps)
    elif silent_sgd_phase:
        lr = 0.0 * lr
    return free_of_schedule(p, state, g + decayed(p, weight_decay), lr, b1, r, weight_lr_power)
