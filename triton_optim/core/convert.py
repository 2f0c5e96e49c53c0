"""Checkpoints in other forms: torch.optim's in full precision, those of other libraries, and float32 weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ..precision.codecs import RESIDUALS, Codec, parameter_codec, part_names, read, write
from ..precision.kept import convert_parameter, convert_state, current_codec, current_parameter_codec
from ..spec import AVERAGE, COUNT, WEIGHTS
from ..util.layout import local, with_local
from .checkpoint import wanted_codecs
from .foreign import CONVERTERS, GROUPS, HYPERPARAMETERS, KINDS, origin, plain
from .loadable import OPTIONAL
from .optimizer import RuleOptimizer
from .saved_form import loaded_state
from .unwrap import unwrap_model, unwrap_optimizer


def convert_state_dict(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of bitsandbytes, torchao, optimi or flashoptim in the form that `optimizer` loads.

    Codes become float32, which the next step brings into the optimizer's own `state_dtype`. Learning rate, betas,
    epsilon, decay and momentum are the checkpoint's, all other options the optimizer's own.

    - bitsandbytes: ``Adam``, ``AdamW``, ``Lion``, ``SGD``, ``RMSprop``, ``Adagrad``, of 32 bits or 8, paged or not. Its
      ``Adam`` decays as ``AdamW`` does, and so will the one here.
    - torchao: ``Adam8bit``, ``AdamW4bit``, ``AdamWFp8`` and their like. Only with torchao can the file be read.
    - optimi: ``Adam``, ``AdamW``, ``RAdam``, ``Lion``, ``SGD``. Its moments have their bias corrected, and get it back
      here. What its Kahan summation keeps goes on with ``param_precision="kahan"``.
    - flashoptim: ``FlashAdam``, ``FlashAdamW``, ``FlashLion``, ``FlashSGD``. Its ``error_bits`` are left out, with a
      warning.

    Args:
        optimizer: of the kind that saved it, of the same parameters in the same order, or what a trainer made of it. It
            is not changed.
        state_dict: it is not changed. One of torch.optim's or ours is returned as it is.

    Raises:
        ValueError: the library has no optimizer of this kind, or its state holds what this one has not.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.zeros(3))
        >>> optimizer = triton_optim.AdamW([p], backend="eager")
        >>> group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        >>> state = {"step": 5, "state1": torch.ones(3), "state2": torch.ones(3)}  # as bitsandbytes has it
        >>> saved = {"state": {0: state}, "param_groups": [group]}
        >>> optimizer.load_state_dict(triton_optim.convert_state_dict(optimizer, saved))
        >>> sorted(optimizer.state[p]), optimizer.param_groups[0]["lr"]
        (['exp_avg', 'exp_avg_sq', 'step'], 0.1)
    """
    optimizer = unwrap_optimizer(optimizer)
    library = origin(state_dict)
    if library is None:
        return dict(state_dict)
    name = type(optimizer).__name__
    kind = next((c.__name__ for c in type(optimizer).__mro__ if c.__name__ in KINDS[library]), None)
    if kind is None:
        raise ValueError(
            f"of the checkpoints of {library} those of {', '.join(KINDS[library])} can be converted, each for the "
            f"optimizer of that name; this is {name}. Make the optimizer that saved it."
        )
    theirs, ours = ([len(g["params"]) for g in which] for which in (state_dict["param_groups"], optimizer.param_groups))
    if theirs != ours:
        raise ValueError(
            f"the state dict of {library} has groups of {theirs} parameters, this {name} of {ours}. Convert it for the "
            "same parameters in the same groups."
        )
    states, groups = {}, []
    for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        taken = {n: plain(saved[n]) for n in HYPERPARAMETERS if n in saved and (n in own or n == "name")}
        taken |= {n: plain(saved[n]) for n in ("initial_lr",) if n in saved}
        groups.append({**own, **taken, **GROUPS[library](kind, saved), "params": list(saved["params"])})
        for i, p in zip(saved["params"], own["params"], strict=True):
            if i in state_dict["state"]:
                state = CONVERTERS[library](kind, saved, i, p, dict(state_dict["state"][i]))
                states[i] = {n: v for n, v in state.items() if n != "step" or optimizer.counts_steps}
    return {"state": states, "param_groups": groups}


def to_torch_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """The state dict in the form of torch.optim's optimizer of the same name, in full precision.

    Codes are decoded, to float32 (states of float64 parameters are as they are). What torch has no name for is left
    out: our options, the corrections of parameters (:func:`master_state_dict` has them), averages, and ``step``
    where torch keeps none.

    Args:
        optimizer: one of this package's, or what a trainer made of it; it is not changed.

    Returns:
        What ``torch.optim.<the same>.load_state_dict`` takes, and :func:`load_torch_state_dict`.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.zeros(4096))
        >>> ours = triton_optim.AdamW([p], state_dtype="int8", backend="eager")
        >>> p.grad = torch.ones(4096)
        >>> ours.step()
        >>> theirs = torch.optim.AdamW([p])
        >>> theirs.load_state_dict(triton_optim.to_torch_state_dict(ours))
        >>> theirs.state[p]["exp_avg"].dtype
        torch.float32
    """
    optimizer = unwrap_optimizer(optimizer)
    saved = optimizer.state_dict()
    groups = [{n: v for n, v in group.items() if n not in OPTIONAL} for group in saved["param_groups"]]
    indices = [i for group in groups for i in group["params"]]
    states: dict[Any, dict[str, Any]] = {}
    for i, p in zip(indices, (p for group in optimizer.param_groups for p in group["params"]), strict=True):
        if i not in saved["state"]:
            continue
        state = loaded_state(optimizer, i, p, saved["state"][i])
        for name, codec in kept_states(optimizer, state):
            parts = [state.pop(part) for part in (name, *part_names(codec, name))]
            value = with_local(p, read(codec, parts, local(p))) if codec.block_size else parts[0]
            half = value.is_floating_point() and value.itemsize < 4
            state[name] = value.float() if half else value
        for name in (*RESIDUALS, AVERAGE, COUNT, WEIGHTS):
            state.pop(name, None)
        if not optimizer.counts_steps:
            state.pop("step", None)
        if state:
            states[i] = state
    return {"state": states, "param_groups": groups}


def load_torch_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a full-precision state dict, of torch.optim's or of :func:`to_torch_state_dict`, and bring its states into
    the codecs of `optimizer` at once. Its options of precision stay its own.

    Raises:
        As :meth:`RuleOptimizer.load_state_dict`; nothing was changed then.
    """
    optimizer = unwrap_optimizer(optimizer)
    optimizer.load_state_dict(state_dict)
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            for name, codec in wanted_codecs(optimizer, group, p, state):
                convert_state(optimizer, state, name, p, codec)


def kept_states(optimizer: RuleOptimizer, state: dict[str, Any]) -> Iterator[tuple[str, Codec]]:
    """The states of a parameter that are there, of any variant of the optimizer, and how each is kept."""
    for name in optimizer.declared:
        codec = current_codec(optimizer, state, name)
        if codec is not None:
            yield name, codec


def master_state_dict(model: Module, optimizer: Optimizer) -> dict[str, Any]:
    """The model's state dict with float32 weights: those that ``param_precision`` keeps.

    Args:
        model: its bfloat16 and float16 parameters come in float32, exact with ``"split32"`` (bfloat16) and
            ``"master"``, nearly so with ``"split24"`` and ``"kahan"``, and as they are where nothing is kept beside
            them. Buffers, and parameters of other dtypes, come as they are. Of DistributedDataParallel and other
            wrappers the module inside is meant.
        optimizer: of these parameters; others than these may be among the model's.

    Returns:
        New tensors by name, which a float32 model of the same kind loads.
    """
    model, optimizer = unwrap_model(model), unwrap_optimizer(optimizer)
    optimizer.engine.check_not_swapped("master_state_dict()")
    optimizer.engine.forget_probe()
    weights: dict[str, Any] = model.state_dict(keep_vars=True)
    return {name: master(value, optimizer) for name, value in weights.items()}


def master(value: Any, optimizer: RuleOptimizer) -> Any:
    """The float32 value of a parameter; of anything else a copy."""
    if not isinstance(value, Tensor):
        return value
    own = value.detach()
    state = optimizer.state.get(value, {})
    codec = current_parameter_codec(state, value)
    if codec.suffixes:
        parts = [local(own), *(local(state[name]).to(own.device) for name in part_names(codec, None))]
        return with_local(own, read(codec, parts, local(own)).clone())
    half = isinstance(value, torch.nn.Parameter) and value.dtype in (torch.bfloat16, torch.float16)
    return own.float() if half else own.clone()


def load_master_state_dict(model: Module, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load float32 weights into a model of bfloat16 or float16 parameters: the way back from :func:`master_state_dict`.

    The parameters become the nearest values of their dtypes, and what is left goes where the ``param_precision`` of
    their groups keeps it. The optimizer's other states stay as they are.

    Raises:
        RuntimeError: the names or shapes are not the model's.
    """
    model, optimizer = unwrap_model(model), unwrap_optimizer(optimizer)
    optimizer.engine.check_not_swapped("load_master_state_dict()")
    model.load_state_dict(state_dict)
    optimizer.engine.forget_probe()
    weights: dict[str, Any] = model.state_dict(keep_vars=True)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in weights.items():
        if id(p) not in groups:
            continue
        codec = parameter_codec(groups[id(p)], p.dtype)
        if codec.suffixes:
            state = optimizer.state[p]
            convert_parameter(state, p, codec)
            value = local(state_dict[name]).to(local(p).device)
            with torch.no_grad():
                write(codec, [local(p).detach(), *(local(state[part]) for part in part_names(codec, None))], value)
    optimizer.engine.plan = None
