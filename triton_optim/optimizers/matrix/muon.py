"""Muon."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from typing_extensions import Unpack

from ...core.checks import check_range
from ...core.factored import averaged
from ...core.optimizer import RuleOptimizer
from ...core.unwrap import unwrap_model
from ...kernels.rules.adam import adamw
from ...kernels.rules.muon import MuonScalars, muon
from ...options import Options
from ...spec import State, Variant
from ...util.layout import gathered, placed_as
from ..adam import AdamW, adam_scalars
from .newton_schulz import newton_schulz, triples
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
    https://arxiv.org/abs/2505.16932. The momentum is torch's, an average.
    """

    variants: ClassVar[tuple[Variant, ...]] = (
        Variant(muon, (), prologue=True),
        Variant(adamw, (State("exp_avg"), State("exp_avg_sq", nonnegative=True))),
    )
    counts_steps = False
    option_names = ()
    group_names = ("use_muon", "extra_dims", "splits")
    kept_states: ClassVar[tuple[State, ...]] = (State("momentum_buffer"),)
    signed: ClassVar[bool] = False  # whether signs of the momentum are orthogonalized

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
        check_range("learning rate", group["lr"], 0.0)
        check_range("weight_decay value", group["weight_decay"], 0.0)
        check_range("momentum value", group["momentum"], 0.0)
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
        mu = group["momentum"]
        buffers = [state["momentum_buffer"] for state in states]
        gradients = [g.to(b.dtype) for g, b in zip(gradients, buffers, strict=True)]
        if torch.is_grad_enabled():  # the graph of a step must not see what the next one writes
            buffers = list(averaged(buffers, gradients, 1 - mu))
        else:
            torch._foreach_lerp_(buffers, gradients, 1 - mu)
        nesterov, signed = group["nesterov"], self.signed
        pieces = Pieces(group, params)

        def fetch(indices: list[int]) -> list[Tensor]:
            momenta: list[Tensor] | tuple[Tensor, ...] = [buffers[i] for i in indices]
            if nesterov:
                momenta = torch._foreach_lerp([gradients[i] for i in indices], momenta, mu)
            return [gathered(m) for m in (torch._foreach_sign(momenta) if signed else momenta)]

        updates = newton_schulz(
            pieces.like(buffers) if nesterov or signed else pieces.cut([gathered(b) for b in buffers]),
            group["ns_coefficients"],
            group["ns_steps"],
            group["eps"],
            self.scales(group, pieces),
            pieces.fetching(fetch) if nesterov or signed else None,
        )
        if updates:  # of no experts there are none
            updates = self.adapted(group, h, params, pieces, updates, states)
        updates = pieces.join(updates)
        return [placed_as(p, update) for p, update in zip(params, updates, strict=True)]

    def scales(self, group: dict[str, Any], pieces: Pieces) -> list[float]:
        """What orthogonalized momenta are multiplied by, before they are adapted."""
        adjusted = ADJUST[group["adjust_lr_fn"]]
        return [adjusted(*shape) for shape in pieces.shapes]

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


def uses_muon(group: dict[str, Any]) -> bool:
    """Whether a group is Muon's, not AdamW's."""
    return bool(group.get("use_muon", True))


def muon_param_groups(
    model: torch.nn.Module,
    heads: str | Collection[str] = ("lm_head", "head", "classifier"),
    adamw: dict[str, Any] | None = None,
    *,
    convolutions: bool = False,
    experts: str | Collection[str] = (),
    splits: Mapping[str, int | Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """A model's parameters as groups for :class:`Muon`: the matrices of its hidden layers, and AdamW's rest.

    AdamW gets what has not two dimensions, what belongs to an embedding, the heads, and biases, which may have two: a
    row for each expert.

    Args:
        model: whose parameters that require gradients are sorted; of DistributedDataParallel and other wrappers the
            module inside is meant.
        heads: names of the modules whose weights make the output, such as ``"lm_head"`` or ``"decoder.out"``: a module
            is meant where its full name or the last part of it is among them. A string is one name.
        adamw: options of the last group: ``lr``, ``betas``, ``eps``, ``weight_decay``.
        convolutions: whether Muon gets the weights of ``Conv1d``, ``Conv2d`` and ``Conv3d``, too, flattened.
        experts: names of modules or parameters, as `heads`, whose parameters of more than two dimensions are batches of
            matrices that Muon gets.
        splits: by such a name, the ``"splits"`` of the weights of a module, or of a parameter.

    Returns:
        The groups that have any parameter, AdamW's last; Muon has one for each way in which parameters are cut into
        matrices, plain ones first.

    Raises:
        ValueError: nothing in the model has a name among `experts` or `splits`.

    Example:
        >>> import torch, triton_optim
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> [len(group["params"]) for group in triton_optim.muon_param_groups(model, heads=["2"])]
        [1, 3]
        >>> model = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(3, 8, 3), "qkv": torch.nn.Linear(8, 24)})
        >>> groups = triton_optim.muon_param_groups(model, convolutions=True, splits={"qkv": 3})
        >>> [{name: value for name, value in group.items() if name != "params"} for group in groups]
        [{'extra_dims': 'flatten'}, {'splits': 3}, {'use_muon': False}]
    """
    model = unwrap_model(model)
    # By identity: a head that is tied to the embedding is one parameter.
    left_out = named(model, heads)
    flattened: set[int] = set()
    for module in model.modules():
        if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
            left_out.update(id(p) for p in module.parameters())
        if convolutions and isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
            flattened.add(id(module.weight))
    left_out.update(id(p) for name, p in model.named_parameters() if name.endswith("bias"))
    batched = named(model, experts, "experts")
    cut = {i: rows for name, rows in (splits or {}).items() for i in named(model, name, "splits")}
    of_muon: dict[Any, dict[str, Any]] = {"": {"params": []}}
    rest: list[Tensor] = []
    for p in model.parameters():
        if not p.requires_grad:
            continue
        extra = {"extra_dims": "flatten"} if id(p) in flattened else {}
        extra = {"extra_dims": "batch"} if p.dim() > 2 and id(p) in batched else extra
        if id(p) in left_out or not (p.dim() == 2 or extra):
            rest.append(p)
            continue
        own = extra | ({"splits": cut[id(p)]} if id(p) in cut else {})
        of_muon.setdefault(str(own) if own else "", {"params": [], **own})["params"].append(p)
    groups = [*of_muon.values(), {"params": rest, "use_muon": False, **(adamw or {})}]
    return [group for group in groups if group["params"]]


def named(model: torch.nn.Module, names: str | Collection[str], argument: str | None = None) -> set[int]:
    """The identities of the parameters that have one of these names, or belong to a module that has; of each the full
    name counts, or the last part of it.

    Args:
        argument: in which the names were given, where each must be one of the model's.
    """
    wanted = {names} if isinstance(names, str) else set(names)
    found: set[int] = set()
    known: set[str] = set()
    for name, module in model.named_modules():
        if own := {name, name.rpartition(".")[2]} & wanted:
            known |= own
            found.update(id(p) for p in module.parameters())
    for name, p in model.named_parameters(remove_duplicate=False) if argument else ():
        if own := {name, name.rpartition(".")[2]} & wanted:
            known |= own
            found.add(id(p))
    if argument and (unknown := sorted(wanted - known)):
        raise ValueError(
            f"muon_param_groups: no module or parameter of the model has the name {unknown[0]!r}, given in {argument}. "
            "Give its full name, or the last part of it."
        )
    return found
