"""A model's parameters, sorted for Muon."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.unwrap import unwrap_model


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
        model: whose parameters that require gradients are sorted.
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
