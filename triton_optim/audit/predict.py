"""What :mod:`triton_optim.audit.gpu_model` says of steps of this package, beside what was measured of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain, product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..bench.models import shapes
from ..precision.codecs import MIN_QUANTIZED_NUMEL, STATE_CODES
from ..util.table import short
from .cases import DTYPES, AuditedRule, Case, every_rule, role_codecs
from .gpu_model import Estimate, Kernel, estimate, one_after_the_other
from .gpus import GPUS, Gpu
from .measure import Measurement, audit


class Measured(NamedTuple):
    """A step that was timed on a GPU, as a file of ``benchmarks/results`` has it."""

    device: str
    case: str
    ms: float
    date: str
    file: str


@dataclass(frozen=True)
class Prediction:
    """What a step would take.

    Attributes:
        gpu, model, rule, dtypes: of what; `rule` and `dtypes` as the audit names them.
        estimate: the model's.
        kept_bytes, memory: what parameters, gradients and states take, and the GPU has.
        measured: the same step, timed on that GPU.
    """

    gpu: str
    model: str
    rule: str
    dtypes: str
    estimate: Estimate
    kept_bytes: float
    memory: float
    measured: list[Measured]


def predictions(
    gpus: Sequence[str], models: Sequence[str], rules: Sequence[str], dtypes: Sequence[str], results: Sequence[Measured]
) -> Iterator[Prediction]:
    """For all of `gpus` (of `GPUS`), named models, rules and sets of dtypes (of the audit)."""
    known = {rule.name: rule for rule in every_rule()}
    # What is summed before a rule is another pass.
    names = {rule: [name for name in (known[rule].measure, rule) if name] for rule in rules}
    every = product(gpus, chain(*names.values()), dtypes)
    cases = list(dict.fromkeys(Case(name, kept, GPUS[gpu].arch, True) for gpu, name, kept in every))
    compiled = dict(zip(cases, audit(cases), strict=True))
    for model, rule, kept, name in product(models, rules, dtypes, gpus):
        gpu, numels = GPUS[name], [prod(shape) for shape in shapes(model)]
        own = predict(gpu, [compiled[Case(each, kept, gpu.arch, True)] for each in names[rule]], numels)
        took = [r for r in results if re.search(gpu.device, r.device) and is_this(r, known[rule], kept, model)]
        yield Prediction(name, model, rule, kept, own, bytes_kept(known[rule], kept, numels), gpu.memory, took)


def predict(gpu: Gpu, passes: Sequence[Measurement], numels: Sequence[int]) -> Estimate:
    """The time of a step whose tensors have so many elements.

    What is too small for codes keeps float32 states, in a launch of its own that is taken to be like the other. After
    a pass that sums, a launch adds up what its programs found.
    """
    kept = DTYPES[passes[0].dtypes]
    launches = len({numel >= MIN_QUANTIZED_NUMEL for numel in numels}) if kept.state_dtype in STATE_CODES else 1
    each = []
    for m in passes:
        kernel = Kernel(m.registers, m.num_warps, m.block, m.shared_bytes, m.loaded, m.stored, m.instructions)
        norm = 0 if m.sums else kept.gradient.itemsize * kept.whole
        each.append(estimate(gpu, kernel, numels, launches * (1 + m.sums), norm))
    return reduce(one_after_the_other, each)


def bytes_kept(rule: AuditedRule, dtypes: str, numels: Sequence[int]) -> float:
    """Of parameters, gradients and states."""
    per_item = sum(codec.nbytes for codec in role_codecs(rule, dtypes)) + DTYPES[dtypes].gradient.itemsize
    return per_item * sum(numels)


def what_fits(rule: AuditedRule, numels: Sequence[int], memory: float) -> list[str]:
    """The sets of dtypes with which parameters, gradients and states do not take more than `memory`."""
    return [dtypes for dtypes in DTYPES if bytes_kept(rule, dtypes, numels) <= memory]


def measured_steps(folder: Path) -> list[Measured]:
    """All steps of this package that files in `folder` say were timed on a GPU.

    Such a file has the GPU's name in ``machine.device``, where a CPU's has "cpu", and its records the time in
    ``figures["ours ms"]``.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        device = content.get("machine", {}).get("device", "cpu")
        for record in content.get("records", []) if device != "cpu" else []:
            figures = record["figures"]
            if "ours ms" in figures:
                found.append(Measured(device, record["case"], figures["ours ms"], content["date"], path.name))
    return found


_CASE = re.compile(r"(?P<label>.+), (?P<model>[^,]+) \((?P<tensors>\d+) tensors\)(?P<rest>.*)")
_QUANTITIES = {"", "ms", "time over the floor"}  # that benchmarks/ appends
_CODEC = re.compile(r" (bf16|fp32)\b.*")  # which benchmarks/ puts into the label, too
# The bench gives SGD momentum.
_RULES = {"sgd": "sgd_momentum", "sgd_without_momentum": "sgd"}


def is_this(step: Measured, rule: AuditedRule, dtypes: str, model: str) -> bool:
    """Whether it is a step of that rule: its case says ``AdamW, gpt2 (148 tensors), bfloat16, state_dtype=int8``.

    A model that was cut down for want of memory has fewer tensors, and is another.
    """
    kept, match = DTYPES[dtypes], _CASE.fullmatch(step.case)
    if match is None or kept.whole:
        return False
    of_state: Any = kept.state_dtype or (kept.state if kept.state != kept.parameter else None)
    words = {
        "" if kept.parameter == torch.float32 else short(kept.parameter),
        "" if of_state is None else f"state_dtype={short(of_state)}",
        "" if kept.param_precision == "storage" else f"param_precision={kept.param_precision}",
    }
    name = re.sub(r"\W", "_", _CODEC.sub("", match["label"])).lower()
    same = (_RULES.get(name, name), match["model"], int(match["tensors"])) == (rule.name, model, len(shapes(model)))
    return same and {word.strip() for word in match["rest"].split(",")} - _QUANTITIES == words - {""}
