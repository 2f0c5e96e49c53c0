"""Learning rates that fit a model of any width, from those that fit a narrow one."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import torch

from ..core.unwrap import unwrap_model


def mup_param_groups(
    model: torch.nn.Module,
    base: torch.nn.Module,
    lr: float,
    weight_decay: float | None = None,
    kind: Literal["adam", "sgd"] = "adam",
) -> list[dict[str, Any]]:
    r"""A model's parameters as groups with the learning rates of the maximal update parametrization (muP), in which the
    rates that are best for a narrow model are best for a wide one.

    A side of a weight is wide where the two models differ in it. With :math:`n_{in}` and :math:`n_{out}` the widths of
    a weight's wide sides, in units of those of `base`, :math:`\gamma` is multiplied by

    | weights | Adam and its like | SGD |
    |---|---|---|
    | of the input, embeddings; vectors | 1 | :math:`n_{out}` |
    | hidden, wide on both sides | :math:`1 / n_{in}` | :math:`n_{out} / n_{in}` |
    | of the output, wide on the side it reads | :math:`1 / n_{in}` | :math:`1 / n_{in}` |
    | neither | 1 | 1 |

    A decay that is multiplied by the learning rate, as AdamW's, is divided by that factor, so that the product stays.

    muP is of how weights start, too: hidden ones and those of the input with a variance of :math:`1 / n_{in}`, which
    torch's defaults have; those of the output with :math:`1 / n_{in}^2`, or of 0: divide torch's by the root of their
    factor of width, or zero them. In attention, scores are divided by the width of a head, not by its root.

    Args:
        model: whose parameters that require gradients are sorted; of DistributedDataParallel and other wrappers the
            module inside is meant.
        base: the same model at the width for which `lr` was found; on the meta device it takes no memory.
        lr: :math:`\gamma \ge 0`, as for `base`.
        weight_decay: as for `base`; None leaves it to the optimizer, for decays that no learning rate multiplies.
        kind: ``"adam"`` for optimizers whose steps are as long as the learning rate says, whatever the gradients, such
            as Adam, Lion and Adafactor; ``"sgd"`` for those whose steps go with the gradients.

    Returns:
        A group for each factor, in the order in which the model has their parameters.

    Raises:
        ValueError: `kind` is unknown, or the models do not have the same parameters.

    Example:
        >>> import torch, triton_optim
        >>> def mlp(width, device="cpu"):
        ...     sides = [(3, width), (width, width), (width, 2)]
        ...     return torch.nn.Sequential(*(torch.nn.Linear(*side, bias=False, device=device) for side in sides))
        >>> groups = triton_optim.mup_param_groups(mlp(64), mlp(16, "meta"), lr=0.1, weight_decay=0.01)
        >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
        [(1, 0.1, 0.01), (2, 0.025, 0.04)]
        >>> optimizer = triton_optim.AdamW(groups)

    Source: Yang et al. 2022, table 3, https://arxiv.org/abs/2203.03466.
    """
    if kind not in ("adam", "sgd"):
        raise ValueError(f'Invalid kind: {kind!r}. Use "adam" or "sgd".')
    model, base = unwrap_model(model), unwrap_model(base)
    shapes = {name: p.shape for name, p in base.named_parameters()}
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # By identity: a head that is tied to the embedding is the embedding.
    tables = {
        id(p)
        for module in model.modules()
        if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag))
        for p in module.parameters(recurse=False)
    }
    groups: defaultdict[float, list[torch.nn.Parameter]] = defaultdict(list)
    for name, p in own.items():
        like = shapes.get(name)
        if like is None or len(like) != p.dim() or 0 in like:
            found = "has no such parameter" if like is None else f"has one of shape {tuple(like)}"
            raise ValueError(
                f"{name} has shape {tuple(p.shape)}, and base {found}. Give the same model at another width."
            )
        ratios = [size / narrow for size, narrow in zip(p.shape, like, strict=True)]
        if p.dim() < 2:
            n_in, n_out = 1.0, ratios[0] if ratios else 1.0
        elif id(p) in tables:
            n_in, n_out = 1.0, ratios[1]
        else:
            n_out, n_in = ratios[0], ratios[1]
        groups[1 / n_in if kind == "adam" else n_out / n_in].append(p)
    decays = {factor: {} if weight_decay is None else {"weight_decay": weight_decay / factor} for factor in groups}
    return [{"params": params, "lr": lr * factor, **decays[factor]} for factor, params in groups.items()]
