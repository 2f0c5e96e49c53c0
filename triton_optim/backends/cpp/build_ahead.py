"""Loops built beside the program from when an optimizer is made: before its first step lies a forward and a backward
pass, and that step waits for what is left.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor

from ...precision.codecs import parameter_codec, state_codec
from ...spec import Update
from ...util.cpp_build import begin
from .source import source


def start(optimizer: Update, group: dict[str, Any], p: Tensor) -> None:
    """Begin to build what parameters like `p` will need, if their gradients are of their dtype."""
    # What cannot be told of an optimizer that is being made, or cannot be built, the first step does, or raises.
    with suppress(Exception):
        variant = optimizer.running_variant(group)
        states = [state_codec(optimizer, group, name, p) for name in variant.state_names]
        codecs = (parameter_codec(group, p.dtype), *states)
        begin(source(variant.rule, scalars_of(optimizer), codecs, p.dtype, variant.averaged))


def scalars_of(optimizer: Update) -> Any:
    """The NamedTuple that `scalars` says it returns: it is not called, for it may count its calls."""
    function: Any = type(optimizer).scalars
    said = function.__annotations__["return"]
    return said if isinstance(said, type) else function.__globals__[said]
