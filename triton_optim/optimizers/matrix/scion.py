"""Scion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from typing_extensions import Unpack

from ...core.checks import check_range, check_ranges
from ...core.optimizer import RuleOptimizer
from ...kernels.rules.muon import MuonScalars, muon
from ...options import Options
from ...spec import State
from ...util.layout import is_sharded
from .momenta import averaged_gradients
from .newton_schulz import newton_schulz, triples
from .owners import shared_out
from .pieces import Pieces, check_pieces, check_shape

TINY = 1e-8  # the authors'


def by_norm(dim: int, power: float) -> Callable[[Tensor], Tensor]:
    """What divides each row (`dim` -1) or column by its norm times that power of its number of elements."""

    def divided(x: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True) * float(max(x.shape[dim], 1)) ** power
        return x / (length + TINY)

    return divided


# What is farthest along a matrix in the balls of the norms that are none of singular values.
ORACLES: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": lambda x: x.sign() / max(x.shape[-1], 1),
    "rows": by_norm(-1, 0.5),
    "columns": by_norm(-2, -0.5),
    "embedding": by_norm(-1, -0.5),
}
SPECTRAL = ("spectral", "spectral_max")
NORMS = ("auto", *SPECTRAL, *ORACLES, "rms")


class Scion(RuleOptimizer):
    r"""Scion: each layer takes the longest step, against the averaged gradient, that the ball of its norm has.

    .. math::
        d_t &= (1 - \alpha) d_{t-1} + \alpha g_t \\
        p_t &= (1 - \gamma) p_{t-1} - \gamma \rho O(d_t), \quad \text{unconstrained} \quad
            p_t = p_{t-1} - \gamma \rho O(d_t)

    where parameters stay in their ball of radius :math:`\rho` in the first form, once they are in it. For a matrix of
    :math:`A \times B`, its rows or columns x, and NS of :class:`Muon`, the ``norm`` of a group says what O is:

    - ``"spectral"``: :math:`\sqrt{A / B} \operatorname{NS}(d)`, for hidden layers; of a convolution A and B are its
      channels, and the factor is divided by the size of its kernel. ``"spectral_max"``, for a first layer that takes
      images: :math:`\max(1, \sqrt{A / B})` in its place.
    - ``"sign"``: :math:`\operatorname{sign}(d) / B`, for the last layer, or an embedding that is the last layer too.
    - ``"rows"``: :math:`x / (\sqrt{B} \lVert x \rVert)`, for a last layer.
    - ``"columns"``: :math:`\sqrt{A} x / \lVert x \rVert`, for a first layer that takes one of its columns. The weight
      of ``torch.nn.Embedding`` has these as rows: ``"embedding"``, :math:`\sqrt{B} x / \lVert x \rVert`.
    - ``"rms"``: d over its root mean square, for biases and the scales of norms.
    - ``"auto"``: ``"rms"`` for what has less than two dimensions, else ``"spectral"``.

    Parameters of more than two dimensions are convolutions. A group's ``"extra_dims": "batch"`` makes them batches of
    matrices, and its ``"splits"`` cut matrices by their rows, as of :class:`Muon`.

    State of a parameter: ``momentum_buffer`` :math:`d`, like it.

    Args:
        params: parameters, named parameters or groups; real ones.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        momentum: :math:`\alpha` in [0, 1], the weight of what is new: 0.1 where others say 0.9; 1 averages nothing.
        norm: one of those above.
        scale: :math:`\rho \ge 0`.
        unconstrained: whether parameters may leave their ball.
        ns_coefficients: as of :class:`Muon`.
        eps: :math:`\epsilon \ge 0` of :class:`Muon`.
        ns_steps: as of :class:`Muon`.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range, `norm` is unknown, or of matrices for a parameter that is none.
        RuntimeError: a parameter is complex (in :meth:`step`).

    Example:
        >>> import torch, triton_optim
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> groups = [{"params": model[0].parameters(), "scale": 50.0},
        ...           {"params": [model[2].weight], "norm": "sign", "scale": 3000.0},
        ...           {"params": [model[2].bias], "scale": 50.0}]
        >>> optimizer = triton_optim.Scion(groups, lr=2**-12, backend="eager")
        >>> model(torch.ones(1, 4)).square().sum().backward()
        >>> optimizer.step()

    For: Whole networks by one rule with one learning rate, each layer in its own norm; settings carry over to wider
    models.

    Source: Pethick et al. 2025, Algorithms 1 and 2, https://arxiv.org/abs/2502.07529; the defaults are of the authors'
    code, which divides by norms plus 1e-8, but for the momentum, 1 there and 0.1 in its examples.
    """

    rule = muon
    kept_states = (State("momentum_buffer"),)
    counts_steps = False
    group_names = ("extra_dims", "splits")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.1,
        norm: str = "auto",
        scale: float = 1.0,
        unconstrained: bool = False,
        ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "norm": norm,
            "scale": scale,
            "unconstrained": unconstrained,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "momentum")
        if not group["momentum"] <= 1:
            raise ValueError(
                f"Invalid momentum value: {group['momentum']}. It is the weight of what is new, at most 1; the default "
                "is 0.1."
            )
        check_ranges(group, "scale", "eps")
        check_range("ns_steps", group["ns_steps"], 0, 100)
        triples(group["ns_coefficients"], group["ns_steps"])
        check_pieces(group)
        if group["norm"] not in NORMS:
            raise ValueError(f"Invalid norm: {group['norm']!r}. Use one of {', '.join(map(repr, NORMS))}.")

    def check_parameter(self, index: int, p: Tensor, group: dict[str, Any]) -> None:
        super().check_parameter(index, p, group)
        if group["norm"] == "rms" or (group["norm"] == "auto" and (is_lazy(p) or p.dim() < 2)):
            return
        if is_lazy(p):
            raise ValueError(
                f"Scion: norm={group['norm']!r} is of matrices; parameter {index} is uninitialized and has no shape "
                "yet. Run the model once on an example before you make the optimizer."
            )
        norm = norm_of(p, group)
        if p.dim() < 2:
            raise ValueError(
                f"Scion: norm={norm!r} is of matrices; parameter {index} has shape {tuple(p.shape)}. Put it in a group "
                'with norm="rms", or "auto".'
            )
        check_shape("Scion", index, p, flattening(group))

    def scalars(self, group: dict[str, Any], step: Any) -> MuonScalars:
        return MuonScalars(lr=group["lr"], keep=1.0 if group["unconstrained"] else 1 - group["lr"])

    def prologue(
        self, group: dict[str, Any], h: Any, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]
    ) -> list[Tensor]:
        buffers, _ = averaged_gradients(states, gradients, group["momentum"])
        if not is_sharded(params[0]):
            return oracle(buffers, group)
        costs = [
            Pieces(flattening(group), [p]).costs()[0] if norm_of(p, group) in SPECTRAL else float(p.numel())
            for p in params
        ]
        return shared_out(
            params,
            costs,
            lambda own: [buffers[i] for i in own],
            lambda whole: oracle(whole, group),
            sent_as=attrgetter("dtype"),
        )


def oracle(tensors: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """What is farthest along each tensor in the ball of the norm of its group."""
    updates = list(tensors)
    alike: dict[str, list[int]] = {}
    for i, x in enumerate(tensors):
        alike.setdefault(norm_of(x, group), []).append(i)
    for norm, own in alike.items():
        for i, update in zip(own, farthest([tensors[i] for i in own], norm, group), strict=True):
            updates[i] = update
    return updates


def norm_of(p: Tensor, group: dict[str, Any]) -> str:
    """The norm of a parameter of a group."""
    norm: str = group["norm"]
    return norm if norm != "auto" else "spectral" if p.dim() >= 2 else "rms"


def flattening(group: dict[str, Any]) -> dict[str, Any]:
    """A group that says that more than two dimensions are flattened, where it says nothing else."""
    return group if group.get("extra_dims") else {**group, "extra_dims": "flatten"}


def farthest(tensors: list[Tensor], norm: str, group: dict[str, Any]) -> list[Tensor]:
    """What is farthest along each in the ball of the norm, of the radius of the group."""
    scale = group["scale"]
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    if norm == "rms":
        sizes = torch._foreach_div(torch._foreach_norm(wide), [max(x.numel(), 1) ** 0.5 for x in wide])
        return list(torch._foreach_mul(torch._foreach_div(wide, torch._foreach_add(sizes, TINY)), scale))
    group = flattening(group)
    pieces = Pieces(group, tensors)
    if norm in ORACLES:
        return pieces.join([ORACLES[norm](x).mul(scale) for x in pieces.cut(wide)])
    kernels = [prod(x.shape[2:]) if group["extra_dims"] == "flatten" else 1 for x in tensors]
    scales = []
    for (rows, columns), owner in zip(pieces.shapes, pieces.owners, strict=True):
        kernel = max(kernels[owner], 1)
        factor = (rows * kernel / max(columns, 1)) ** 0.5
        scales.append(scale * (max(1.0, factor) if norm == "spectral_max" else factor) / kernel)
    matrices = pieces.cut(tensors)
    return pieces.join(newton_schulz(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"], scales))
