"""Muon."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.parameter import is_lazy
from typing_extensions import Unpack

from ...core.checks import check_range, check_ranges
from ...core.optimizer import RuleOptimizer
from ...kernels.rules.adam import adamw
from ...kernels.rules.muon import MuonScalars, muon
from ...options import Options
from ...spec import State, Variant
from ...util.layout import is_sharded, placed_as
from ..adam import MOMENTS, AdamW, adam_scalars
from .momenta import Momenta, averaged_gradients
from .newton_schulz import triples
from .pieces import Pieces, check_pieces, check_shape

# The factor of an update of a matrix, by its numbers of rows and columns; torch's names.
ADJUST: dict[str | None, Callable[[int, int], float]] = {
    None: lambda rows, columns: max(1.0, rows / max(columns, 1)) ** 0.5,
    "original": lambda rows, columns: max(1.0, rows / max(columns, 1)) ** 0.5,
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
    "spectral_unclamped": lambda rows, columns: (rows / max(columns, 1)) ** 0.5,
}
# What an AdamW group has unless it says otherwise: torch.optim.AdamW's.
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


class Muon(RuleOptimizer):
    r"""Muon, with torch.optim.Muon's arguments, defaults and state: momentum, orthogonalized, for the matrices of
    hidden layers; and AdamW for all else, in the same optimizer.

    .. math::
        b_t &= \mu b_{t-1} + (1 - \mu) g_t, \qquad
        m_t = \mu b_t + (1 - \mu) g_t \text{ (nesterov), else } b_t \\
        p_t &= (1 - \gamma\lambda) p_{t-1} - \gamma s \operatorname{NS}(m_t)

    NS brings all singular values near 1: from :math:`X = m_t / \max(\lVert m_t \rVert_F, \epsilon)` on, ``ns_steps``
    times :math:`X \leftarrow a X + (b X X^\top + c (X X^\top)^2) X`, with the same a, b and c or others for each step.
    For a parameter of :math:`A \times B`, s is :math:`\sqrt{\max(1, A / B)}`, with ``"match_rms_adamw"``
    :math:`0.2 \sqrt{\max(A, B)}`, with ``"spectral_unclamped"`` :math:`\sqrt{A / B}`.

    Matrices of one shape, or its transpose, are iterated together, and of a symmetric product one half is computed.
    Where one side is more than 1.5 times the other, the small matrix :math:`X X^\top` is iterated, and computed anew
    from X after as many steps as rounding allows: of torch's coefficients after three. All that is done in bfloat16 on
    GPUs and on CPUs with instructions for it; elsewhere in float32 (float64 parameters: float64). torch iterates in
    bfloat16 everywhere, so the two agree to its precision.

    A parameter group with ``"use_muon": False`` is updated by AdamW, in the group's ``lr``, ``betas``, ``eps`` and
    ``weight_decay``, by default torch.optim.AdamW's. Other groups may say of which matrices their parameters consist,
    each of which is orthogonalized, and multiplied by the s of its own shape:

    - ``"extra_dims"``, of parameters of more than two dimensions: ``"batch"``, the last two are a matrix each, as of
      experts ``[E, m, n]``; or ``"flatten"``, the first are the rows and all others the columns, as of convolutions.
    - ``"splits"``: into how many blocks of rows each matrix is cut, all of one size, or a list of the rows that each
      has: 3 of a fused weight of queries, keys and values, ``[1024, 256, 256]`` where these are of different sizes,
      three times the number of heads where each head is to be a matrix.

    :func:`muon_param_groups` sorts a model's parameters so.

    Sharded matrices are shared out: each is sent to one of the ranks that have its parts, which iterates it and sends
    each its part of the update, while the next ones are on their way. Experts that are cut between their matrices are
    iterated where they lie.

    State of a parameter: ``momentum_buffer`` :math:`b`, like it; in a group of AdamW ``step``, ``exp_avg`` and
    ``exp_avg_sq``.

    Args:
        params: parameters, named parameters or groups; real, and of two dimensions but where their group says else.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        weight_decay: :math:`\lambda \ge 0`.
        momentum: :math:`\mu \ge 0`.
        nesterov: Nesterov's momentum.
        ns_coefficients: :math:`(a, b, c)`, or a sequence of such triples, one a step, or the name of one:
            ``"polar_express"``, 5 steps that bring values from 1e-3 on nearer to 1 than torch's triple does.
        eps: :math:`\epsilon`.
        ns_steps: number of iterations, below 100. Where each has its triple it must be their number.
        adjust_lr_fn: None or ``"original"``, ``"match_rms_adamw"``, with which AdamW's rates and decays fit, or
            ``"spectral_unclamped"``, with which an update's spectral norm goes with the square root of its shape.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter has not two dimensions or rows that are not cut.
        RuntimeError: a parameter is complex (in :meth:`step`).

    Example:
        >>> import torch, triton_optim
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 10))
        >>> groups = triton_optim.muon_param_groups(model, heads=["2"], adamw={"lr": 3e-4})
        >>> [len(group["params"]) for group in groups]
        [1, 4]
        >>> optimizer = triton_optim.Muon(groups, lr=0.02, backend="eager")
        >>> model(torch.arange(10)).square().sum().backward()
        >>> optimizer.step()
        >>> [sorted(optimizer.state[group["params"][0]]) for group in optimizer.param_groups]
        [['momentum_buffer'], ['exp_avg', 'exp_avg_sq', 'step']]

    For: Hidden matrices of transformers, in half of AdamW's state. A comparison (https://arxiv.org/abs/2509.02046) saw
    1.4 times fewer steps than a tuned AdamW's at 0.1B parameters, and 1.1 at 1.2B.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; ``"match_rms_adamw"``: Liu et al. 2025,
    section 2.2, https://arxiv.org/abs/2502.16982; ``"spectral_unclamped"``: Bernstein 2025,
    https://jeremybernste.in/writing/deriving-muon; ``"polar_express"``: Amsel et al. 2025,
    https://arxiv.org/abs/2505.16932, whose safety factor, 1.01, is 1.05 here. The momentum is torch's, an average.
    """

    variants: ClassVar[tuple[Variant, ...]] = (Variant(muon, (), prologue=True), Variant(adamw, MOMENTS))
    counts_steps = False
    option_names: ClassVar[tuple[str, ...]] = ()
    group_names = ("use_muon", "extra_dims", "splits")
    kept_states: ClassVar[tuple[State, ...]] = (State("momentum_buffer"),)
    signed: ClassVar[bool] = False  # whether signs of the momentum are orthogonalized
    adapts: ClassVar[bool] = False  # whether `adapted` makes the updates; their factor s is then its own

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        if not uses_muon(group):
            AdamW.check_hyperparameters(self, group)  # type: ignore[arg-type]
            return
        check_ranges(group, "lr", "weight_decay", "momentum")
        check_range("ns_steps", group["ns_steps"], 0, 100)
        triples(group["ns_coefficients"], group["ns_steps"])
        check_pieces(group)
        if group["adjust_lr_fn"] not in ADJUST:
            raise ValueError(
                f"Adjust learning rate function {group['adjust_lr_fn']} is not supported. "
                'Use "original", "match_rms_adamw", "spectral_unclamped" or None.'
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; one with ``"use_muon": False`` is AdamW's."""
        if isinstance(param_group, dict) and not uses_muon(param_group):
            param_group = ADAMW | param_group
        super().add_param_group(param_group)

    def check_parameter(self, index: int, p: Tensor, group: dict[str, Any]) -> None:
        if uses_muon(group) and is_lazy(p):
            raise ValueError(
                f"Muon only supports 2D parameters; parameter {index} is uninitialized and has no shape yet. Run the "
                "model once on an example before you make the optimizer."
            )
        if uses_muon(group):
            check_shape("Muon", index, p, group)
        super().check_parameter(index, p, group)

    def variant(self, group: dict[str, Any]) -> Variant:
        return self.variants[0 if uses_muon(group) else 1]

    def scalar_state_names(self, group: dict[str, Any]) -> list[str]:
        names = super().scalar_state_names(group)
        return names if uses_muon(group) or "step" in names else ["step", *names]

    def scalars(self, group: dict[str, Any], step: Any) -> Any:
        if uses_muon(group):
            return MuonScalars(lr=group["lr"], keep=1 - group["lr"] * group["weight_decay"])
        return adam_scalars(group, step, decoupled=True)

    def prologue(
        self, group: dict[str, Any], h: Any, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]
    ) -> list[Tensor]:
        buffers, gradients = averaged_gradients(states, gradients, 1 - group["momentum"])
        momenta = Momenta(group, buffers, gradients, self.signed, None if self.adapts else scales_of)
        if is_sharded(params[0]):
            updates = momenta.of_shards(params, everywhere=self.adapts)
            if not self.adapts:
                return updates
            pieces = Pieces(group, params)
            updates = pieces.cut(updates)
        else:
            pieces, updates = momenta.orthogonalized()
        if self.adapts and updates:  # of no experts there are none
            updates = self.adapted(group, h, params, pieces, updates, states)
        return [placed_as(p, update) for p, update in zip(params, pieces.join(updates), strict=True)]

    def adapted(
        self,
        group: dict[str, Any],
        h: Any,
        params: list[Tensor],
        pieces: Pieces,
        updates: list[Tensor],
        states: list[dict[str, Any]],
    ) -> list[Tensor]:
        """What is subtracted of each piece, made of whole orthogonalized momenta."""
        return updates


def scales_of(group: dict[str, Any], pieces: Pieces) -> list[float]:
    """The factor s of each piece's update."""
    adjusted = ADJUST[group["adjust_lr_fn"]]
    return [adjusted(*shape) for shape in pieces.shapes]


def uses_muon(group: dict[str, Any]) -> bool:
    """Whether a group is Muon's, not AdamW's."""
    return bool(group.get("use_muon", True))
