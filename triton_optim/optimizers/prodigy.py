"""Prodigy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_count, check_positive, check_range, check_ranges
from ..core.optimizer import RuleOptimizer
from ..core.whole_model import EstimatesDistance, check_estimate, over_model
from ..kernels.language import torch_form
from ..kernels.rules.prodigy import ProdigyScalars, prodigy, prodigy_sampled, prodigy_samples, prodigy_sums
from ..options import Options
from ..spec import Measured, State, Variant, first_value
from ..util.in_place import write_each
from ..util.layout import is_sharded, samples
from .adam import MOMENTS

SAMPLES = torch_form(prodigy_samples)


def sampled(p: Tensor, group: dict[str, Any]) -> Tensor:
    """The elements of a parameter that are sampled, in float32 or wider."""
    own = samples([p if group.get("differentiable") else p.detach()], int(group["slice_p"]))
    return own.to(torch.promote_types(own.dtype, torch.float32))


class Prodigy(EstimatesDistance, RuleOptimizer):
    r"""Prodigy: Adam that finds its step size, from how far the gradients point back to where the parameters began.

    With sums over the whole model, :math:`\eta_t = d_{t-1} \gamma` and :math:`\delta_t = \eta_t d_{t-1} / d_0`:

    .. math::
        n_t &= \beta_3 n_{t-1} + \delta_t \langle g_t, p_0 - p_{t-1} \rangle, \qquad
            s_t = \beta_3 s_{t-1} + \delta_t g_t, \qquad
            \hat d_t = c \, n_t / \lVert s_t \rVert_1 \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) d_{t-1} g_t, \qquad
            v_t = \beta_2 v_{t-1} + (1 - \beta_2) d_{t-1}^2 g_t^2 \\
        \bar d_t &= \max(\bar d_{t-1}, \hat d_t), \qquad d_t = \min(\bar d_t, \rho d_{t-1}) \\
        p_t &= (1 - \eta_t \lambda) p_{t-1} - \eta_t \frac{m_t}{\sqrt{v_t} + d_t \epsilon}

    As in the authors' code, :math:`\rho` does not hold the first estimate down: while :math:`d_{t-1} = d_0`,
    :math:`d_t = \min(\bar d_t, \rho \max(d_0, \hat d_t))`. While all gradients are 0, nothing is estimated.

    Leave ``lr`` at 1 and let a schedule multiply it. Parameters whose ``lr`` is 0 stand still, and so do their states;
    the estimate is of the others. Options that tell how to estimate are the first group's.

    With ``slice_p`` of k the sums of :math:`n_t` and :math:`\lVert s_t \rVert_1` are over every k-th element of each
    parameter, flattened, from its first on. Both grow alike with the number of elements, so the estimate is about the
    same, and s and :math:`p_0` take a k-th of the memory.

    State of a parameter: ``step`` (0-dim float32); ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v`, ``s`` and ``p0``,
    like the parameter; with ``slice_p`` above 1, in place of the last two, ``s_sampled`` and ``p0_sampled``, a vector
    each in float32 or wider, whatever ``state_dtype`` is; and of the whole model, each 0-dim and float64 where the
    device has it: ``d``, ``d_max`` :math:`\bar d` and ``d_numerator`` :math:`n`. The property ``d`` is the estimate, on
    the device.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        beta3: :math:`\beta_3` in [0, 1); None for :math:`\sqrt{\beta_2}`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        decouple: whether the decay is as above; else :math:`\lambda p` is added to the gradient.
        use_bias_correction: whether :math:`\eta` has Adam's bias corrections,
            :math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`.
        safeguard_warmup: whether s has :math:`d_{t-1}` in place of :math:`\eta_t`, for warm-ups.
        d0: :math:`d_0 > 0`, the first estimate.
        d_coef: :math:`c > 0`: the way to make the steps longer or shorter.
        growth_rate: :math:`\rho \ge 1`: how many times as large the estimate may become in a step.
        slice_p: k, of how many elements one is sampled; an int of 1 or more. 11 is the authors' example.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: ``slice_p`` is above 1 and a parameter sharded: which elements are sampled would depend on the
            number of processes.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = triton_optim.Prodigy([p], backend="eager")
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     p.square().sum().backward()
        ...     optimizer.step()
        >>> bool(p.abs() < 0.1), bool(optimizer.d > 0.01)
        (True, True)

    For: Fine-tuning, of diffusion models above all, without a learning rate to tune, if there is memory for twice
    AdamW's state; with ``slice_p``, for hardly more than AdamW's. Leave lr at 1.

    Source: Mishchenko and Defazio 2023, Algorithm 4, https://arxiv.org/abs/2306.06101; the bias corrections, the
    warm-up's safeguard, the bound of the growth and the samples are the authors' code's. There the corrections count
    the steps of all, here each parameter its own; and a group whose ``lr`` becomes 0 goes on by its mean, and decays.
    """

    variants = (
        Variant(prodigy, (*MOMENTS, State("s"), State("p0", start="parameter", quantized=False)), measure=prodigy_sums),
        Variant(prodigy_sampled, MOMENTS, sampled="slice_p"),
    )
    kept_states = (
        State("d"),
        State("d_max"),
        State("d_numerator"),
        State("s_sampled", lambda p, group: None if group["slice_p"] == 1 else sampled(p, group).zero_()),
        State("p0_sampled", lambda p, group: None if group["slice_p"] == 1 else sampled(p, group)),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = float("inf"),
        slice_p: int = 1,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "beta3": beta3,
            "eps": eps,
            "weight_decay": weight_decay,
            "decouple": decouple,
            "use_bias_correction": use_bias_correction,
            "safeguard_warmup": safeguard_warmup,
            "d0": d0,
            "d_coef": d_coef,
            "growth_rate": growth_rate,
            "slice_p": slice_p,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "weight_decay")
        if group["beta3"] is not None:
            check_range("beta3 value", group["beta3"], 0.0, 1.0)
        check_estimate(group)
        check_positive("d_coef", group["d_coef"])
        check_count("slice_p", group["slice_p"], 1)

    def check_parameter(self, index: int, p: Tensor, group: dict[str, Any]) -> None:
        super().check_parameter(index, p, group)
        if group["slice_p"] > 1 and is_sharded(p):
            raise RuntimeError(
                f"{type(self).__name__}: parameter {index} is sharded, and slice_p={group['slice_p']} samples whole "
                "parameters. Leave slice_p at 1."
            )

    def variant(self, group: dict[str, Any]) -> Variant:
        return self.variants[0 if group["slice_p"] == 1 else 1]

    def first_kept(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        own = [] if group["slice_p"] == 1 else self.kept_states[3:]
        return super().first_kept(p, group) | {state.name: first_value(state, p, group) for state in own}

    def first_numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        return float(group["d0"]), float(group["d0"]), 0.0

    def scalars(self, group: dict[str, Any], step: Any) -> ProdigyScalars:
        """As they are where d is 1."""
        lr, d0, (beta1, beta2) = group["lr"], group["d0"], group["betas"]
        beta3 = beta2**0.5 if group["beta3"] is None else group["beta3"]
        moves = (lr > 0) * 1.0
        rate = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step) if group["use_bias_correction"] else lr
        decay, decouple = group["weight_decay"], group["decouple"]
        return ProdigyScalars(
            step_size=rate,
            fade=-rate * decay if decouple else 0.0,
            l2=0.0 if decouple else decay,
            beta1=moves * beta1 + (1 - moves),
            one_minus_beta1=moves * (1 - beta1),
            beta2=moves * beta2 + (1 - moves),
            one_minus_beta2=moves * (1 - beta2),
            beta3=moves * beta3 + (1 - moves),
            share=moves / d0 if group["safeguard_warmup"] else rate / d0,
            eps=group["eps"],
            weight=rate / d0,
            counts=moves,
            decay=beta3,
            d_coef=group["d_coef"],
            growth_rate=group["growth_rate"],
        )

    def kept_scalars(self, measured: Measured) -> dict[str, Any]:
        (d, *_), h = self.kept_numbers(measured), measured.h
        square = d * d
        return {
            "step_size": h.step_size * d,
            "fade": h.fade * d,
            "one_minus_beta1": h.one_minus_beta1 * d,
            "one_minus_beta2": h.one_minus_beta2 * square,
            "share": h.share * square,
        }

    def sums(self, measured: Measured, params: Tensor, gradients: Tensor) -> tuple[Tensor, ...]:
        held = [state["s_sampled"] for state in measured.states]
        p0 = torch.cat([state["p0_sampled"] for state in measured.states])
        products, sizes, s = SAMPLES(params, gradients, torch.cat(held), p0, measured.h)
        write_each(held, s.split([len(own) for own in held]))
        wide = measured.numel.dtype
        return products.sum(dtype=wide), sizes.sum(dtype=wide)

    def total(self, measured: list[Measured]) -> Tensor | None:
        """The estimate after the step."""
        if not measured:
            return None
        first = measured[0]
        d, d_max, numerator = self.kept_numbers(first)
        # Numbers of a group are tensors only where the device reads them.
        terms = [(m.h.weight * m.sums[0].sum(), m.h.counts * m.sums[1].sum()) for m in measured]
        products, sizes = over_model(measured, terms).unbind()
        new, there = first.h.decay * numerator + d * d * products, sizes > 0
        found = torch.where(there, first.h.d_coef * new / torch.where(there, sizes, 1.0), d)
        numerator = torch.where(there, new, numerator)
        d_max = torch.where(found > d_max, found, d_max)  # of NaN it stays as it is
        start = torch.where((d == first.group["d0"]) & (found > d), found, d)
        grown = start * first.h.growth_rate
        d = torch.where(there, torch.where(d_max < grown, d_max, grown), d)
        self.keep_numbers(d, d_max, numerator)
        return d

    def factors(self, measured: Measured) -> dict[str, Any]:
        return {"eps": measured.h.eps * measured.total.to(measured.numel.device)}
