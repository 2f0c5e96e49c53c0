"""Edits of the code that some test must notice: for `mutants.py`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS, SUFFIXES = ("triton_optim", "kernels"), (".py", ".h", ".cpp")


class Mutant(NamedTuple):
    """An edit.

    Attributes:
        name: what is wrong then.
        matters: what a user would see of it.
        old: what is found exactly once in the code.
        new: what takes its place.
        tests: pytest's arguments, of tests that should notice it.
    """

    name: str
    matters: str
    old: str
    new: str
    tests: str


@cache
def sources() -> dict[Path, str]:
    """The code."""
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    return {path: path.read_text() for path in sorted(files)}


def place_of(mutant: Mutant) -> Path:
    """The file that a mutant is an edit of.

    Raises:
        ValueError: what it changes is not there, or more than once.
    """
    found = [path for path, text in sources().items() for _ in range(text.count(mutant.old))]
    if len(found) != 1:
        places = ", ".join(str(path.relative_to(ROOT)) for path in found) or "no file"
        raise ValueError(f"{mutant.name!r} changes {mutant.old!r}, which is in {places}. Give what is there once.")
    return found[0]


PLAIN = "-k 'not compiled and not triton and not cpp'"  # tests that compile nothing

MUTANTS = (
    # Rules.
    Mutant(
        "Adam's bias correction is of another step",
        "the first steps of Adam are too long or too short",
        "correction=(1 - beta2**step) ** -0.5,\n        eps",
        "correction=(1 - beta2 ** (step + 1)) ** -0.5,\n        eps",
        "tests/test_accuracy.py -k 'Adam and eager'",
    ),
    Mutant(
        "AdamW decays after the update",
        "the update is decayed, too",
        "return descend(p * h.decay, exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq",
        "return descend(p, exp_avg, exp_avg_sq, h) * h.decay, exp_avg, exp_avg_sq",
        "tests/test_accuracy.py -k 'AdamW and eager'",
    ),
    Mutant(
        "AMSGrad divides by the newest moment",
        "it is Adam",
        "return descend(p * h.decay, exp_avg, max_exp_avg_sq, h)",
        "return descend(p * h.decay, exp_avg, exp_avg_sq, h)",
        "tests/test_accuracy.py -k 'AdamW and eager'",
    ),
    Mutant(
        "Lion takes the sign of the next momentum",
        "the gradient of this step hardly counts",
        "update = sign(h.beta1 * exp_avg + h.one_minus_beta1 * g)",
        "update = sign(h.beta2 * exp_avg + h.one_minus_beta2 * g)",
        "tests/test_accuracy.py -k 'Lion and eager'",
    ),
    Mutant(
        "NAdam looks ahead by the momentum of this step",
        "Nesterov's part is of the wrong weight",
        "momentum(group, step), momentum(group, step + 1)",
        "momentum(group, step), momentum(group, step)",
        "tests/test_accuracy.py -k 'NAdam and eager'",
    ),
    Mutant(
        "RAdam divides 0 by 0 while the variance can't be told",
        "the derivative by a learned rate is NaN",
        'eps=group["eps"] + 1.0 * plain,',
        'eps=group["eps"],',
        "tests/test_eager.py -k radams",
    ),
    Mutant(
        "Rprop goes on by a gradient of another sign",
        "it steps back over a minimum it has just passed, with a step that was cut",
        "g = where(agreement < 0, 0.0, g)",
        "g = where(agreement < 0, g, g)",
        "tests/test_accuracy.py -k 'Rprop and eager'",
    ),
    Mutant(
        "SGD leaves Nesterov's gradient out",
        "Nesterov's form is plain momentum",
        "return p - h.lr * (g + h.nesterov * momentum_buffer), momentum_buffer",
        "return p - h.lr * momentum_buffer, momentum_buffer",
        "tests/test_accuracy.py -k 'SGD and eager'",
    ),
    Mutant(
        "centred RMSprop takes the root of a rounding error",
        "equal gradients make parameters NaN",
        "return sqrt(where(variance < 0, 0.0, variance))",
        "return sqrt(variance)",
        "tests/test_infinities.py tests/test_accuracy.py -k 'RMSprop and eager'",
    ),
    Mutant(
        "a decay of 0 touches infinite parameters",
        "a mask of -inf becomes NaN",
        "return where(l2 == 0, g, g + l2 * p)",
        "return g + l2 * p",
        "tests/test_infinities.py -k eager",
    ),
    Mutant(
        "Adagrad's rate decays from the first step on",
        "it is behind torch's by a step",
        'lr = group["lr"] / (1 + (step - 1) * group["lr_decay"])',
        'lr = group["lr"] / (1 + step * group["lr_decay"])',
        "tests/test_accuracy.py -k 'Adagrad and eager'",
    ),
    Mutant(
        "ASGD begins to average a step late",
        "the average is another one than torch's",
        'lr, late = group["lr"], step - group["t0"]',
        'lr, late = group["lr"], step - group["t0"] - 1',
        "tests/test_accuracy.py -k 'ASGD and eager'",
    ),
    Mutant(
        "Adafactor does not clip",
        "one wild gradient moves everything",
        "torch._foreach_clamp_min(clips, 1.0)",
        "torch._foreach_clamp_min(torch._foreach_mul(clips, 0.0), 1.0)",
        "tests/test_accuracy.py -k 'Adafactor and eager'",
    ),
    # How values are kept.
    Mutant(
        "the scale of int4 codes is rounded to the nearest",
        "the largest of a block is cut off",
        "number_of((bits_of(scale) + 0xFF00) & -0x10000)",
        "number_of((bits_of(scale) + 0x8000) & -0x10000)",
        f"tests/test_codecs.py {PLAIN}",
    ),
    Mutant(
        "int8 codes are cut, not rounded",
        "moments shrink with every step",
        "part = 0.5",
        "part = 0.0",
        f"tests/test_codecs.py {PLAIN}",
    ),
    Mutant(
        "a second moment may be kept as 0",
        "its root is divided by",
        "where(x > 0, where(k < 1, 1.0, k), 0.0)",
        "where(x > 0, k, 0.0)",
        f"tests/test_codecs.py {PLAIN}",
    ),
    Mutant(
        "split32 loses its lowest byte",
        "training is not that of float32",
        "value = number_of(bits_of(parts[0]) + (parts[1] << 8) + (parts[2] & 0xFF))",
        "value = number_of(bits_of(parts[0]) + (parts[1] << 8))",
        f"tests/test_codecs.py {PLAIN}",
    ),
    Mutant(
        "Kahan's compensation is of the other sign",
        "roundings add up twice as fast",
        'parts = (p, where(abs(p) < float("inf"), x - p, 0.0))',
        'parts = (p, where(abs(p) < float("inf"), p - x, 0.0))',
        f"tests/test_codecs.py {PLAIN}",
    ),
    Mutant(
        "a tensor of just 4,096 elements is not quantized",
        "a promise of the docs is off by one",
        "local(p).numel() < CODES_FROM",
        "local(p).numel() <= CODES_FROM",
        f"tests/test_codecs.py {PLAIN}",
    ),
    Mutant(
        "stochastic rounding is to the nearest",
        "small updates are lost",
        "number_of((bits_of(x) + where(abs(x) < 3.3895313892515355e38, bits, 0)) & -0x10000)",
        "number_of((bits_of(x) + where(abs(x) < 3.3895313892515355e38, 0x8000, 0)) & -0x10000)",
        f"tests/test_stochastic_rounding.py {PLAIN}",
    ),
    Mutant(
        "what is finite may be rounded to infinity",
        "the largest numbers of bfloat16 become Inf",
        "where(abs(x) < 3.3895313892515355e38, bits, 0)",
        "bits",
        f"tests/test_stochastic_rounding.py tests/test_codecs.py {PLAIN}",
    ),
    Mutant(
        "a parameter and its state share random bits",
        "their roundings are correlated",
        "if ROLE % 2 == 0:",
        "if ROLE % 2 != 2:",
        f"tests/test_stochastic_rounding.py {PLAIN}",
    ),
    Mutant(
        "random bits do not depend on the step",
        "every step rounds an element the same way",
        "return mixed(mixed(mixed(low) + high) + step)",
        "return mixed(mixed(low) + high)",
        f"tests/test_stochastic_rounding.py {PLAIN}",
    ),
    # Averages.
    Mutant(
        "an average's end leaves a trace of its start",
        "a NaN of long ago stays in the average though its decay is 0",
        "return where(weight == 1, end, where(start == end, end, between))",
        "return where(start == end, end, between)",
        f"tests/test_infinities.py tests/test_averaging.py {PLAIN}",
    ),
    Mutant(
        "an average does not reach its end exactly",
        "with a small decay it is off by a rounding of the difference",
        "between = where(weight < 0.5, start + weight * difference, end - difference * (1 - weight))",
        "between = start + weight * difference",
        f"tests/test_infinities.py tests/test_averaging.py {PLAIN}",
    ),
    Mutant(
        "the warm-up of an average is of another length",
        "early averages are not those of the docs",
        "decay = min(decay, (1 + count) / (10 + count))",
        "decay = min(decay, (1 + count) / (11 + count))",
        f"tests/test_averaging.py {PLAIN}",
    ),
    # Clipping, norms and gradient scaling.
    Mutant(
        "clipping divides by the norm alone",
        "a norm of 0 under a limit of 0 makes NaN, and it is not torch's factor",
        "return (max_norm / (norm + 1e-6)).clamp(max=1.0)",
        "return (max_norm / norm).clamp(max=1.0)",
        f"tests/test_clipping.py tests/test_amp.py {PLAIN}",
    ),
    Mutant(
        "the kernel's clipping divides by the norm alone",
        "steps on a GPU are not those on a CPU",
        "clip = tl.load(max_norm) / (norm + 1e-6)",
        "clip = tl.load(max_norm) / norm",
        "tests/test_clipping.py tests/test_amp.py tests/test_training_step.py -k triton",
    ),
    Mutant(
        "a skipped step is not skipped where a norm is taken",
        "an overflow of float16 training makes everything NaN",
        "skip = (faults != 0).to(wide)",
        "skip = (faults < 0).to(wide)",
        f"tests/test_amp.py {PLAIN}",
    ),
    Mutant(
        "the kernel counts no fault",
        "an overflow on a GPU is not noticed",
        'faults += tl.where(x < float("inf"), 0, 1)',
        'faults += tl.where(x <= float("inf"), 0, 1)',
        "tests/test_clipping.py tests/test_amp.py -k triton",
    ),
    Mutant(
        "the norm is of gradients with their scale",
        "clipping depends on the loss scale",
        "norm = norm_from(partials, EUCLIDEAN) * factor",
        "norm = norm_from(partials, EUCLIDEAN)",
        f"tests/test_amp.py {PLAIN}",
    ),
    Mutant(
        "a caller's own gradient scale is forgotten",
        "gradients that were scaled besides are too large",
        'optimizer.grad_scale = scale * getattr(optimizer, "grad_scale", 1)',
        "optimizer.grad_scale = scale",
        f"tests/test_amp.py {PLAIN}",
    ),
    Mutant(
        "a NaN on one rank is lost in the largest magnitude",
        "sharded training goes on from NaN",
        "row[0].masked_fill(row[2] != 0, math.nan)",
        "row[0]",
        "tests/test_sharded.py -k a_nan_on_one_rank",
    ),
    # Memory, plans and what a step takes note of.
    Mutant(
        "slices that touch are taken to overlap",
        "parameters in one buffer, as of most sharding, run one by one",
        "if start < reach[0]:",
        "if start <= reach[0]:",
        f"tests/test_layouts.py tests/test_symmetric_product.py tests/test_gradient_release.py {PLAIN}",
    ),
    Mutant(
        "a plan holds for other parameters",
        "a parameter that was replaced is not stepped",
        "return len(params) == len(self.params) and all(map(is_, params, self.params))",
        "return len(params) == len(self.params)",
        f"tests/test_contract.py tests/test_capture.py tests/test_state_machine.py {PLAIN}",
    ),
    Mutant(
        "a gradient of another shape is not noticed",
        "a kernel reads past its end",
        "if g.shape != value.shape:",
        "if g.dim() != value.dim():",
        "tests/test_errors.py -k 'another_shape or broadcast'",
    ),
    Mutant(
        "an address counts as aligned at 8 bytes",
        "a GPU faults on a view",
        "return bits % 16 == 0",
        "return bits % 8 == 0",
        "tests/test_layouts.py -k 'triton or aligned'",
    ),
    Mutant(
        "gathered gradients may have another dtype",
        "bits of one dtype are read as another's",
        "if (g->dtype() != bucket.dtype || !alike",
        "if (!alike",
        "tests/test_gather.py -k 'not compiled'",
    ),
    Mutant(
        "a state that moved is not noticed",
        "freed memory is written",
        "known.storage->mutable_data() == known.memory &&",
        "true &&",
        "tests/test_gather.py -k 'not compiled'",
    ),
    Mutant(
        "a state that a user replaced is not noticed",
        "the step goes on from the old one",
        '"__ior__", "clear", "pop",',
        '"clear", "pop",',
        "tests/test_watched_state.py",
    ),
    Mutant(
        "hyperparameters may trade their names",
        "a step takes a number for another",
        "and tuple(group) == self._names",
        "",
        f"tests/test_hyperparameters.py {PLAIN}",
    ),
    Mutant(
        "a step that is captured may lack a gradient",
        "replays never update that parameter",
        "if p.requires_grad and g is None:",
        "if not p.requires_grad and g is None:",
        "tests/test_capture.py tests/test_device_rows.py",
    ),
    Mutant(
        "complex parameters go to a kernel",
        "it has no such numbers",
        "if request.dtype.is_complex:",
        "if request.dtype == torch.complex128:",
        "tests/test_dispatch.py tests/test_eager.py -k 'not compiles'",
    ),
    Mutant(
        "a gradient may arrive twice",
        "half of an accumulated gradient is lost without a word",
        "if id(p) in self._arrived:\n            raise",
        "if id(p) in self._hooks:\n            raise",
        f"tests/test_gradient_release.py {PLAIN}",
    ),
    # What is saved, told and reported.
    Mutant(
        "saved step counts share memory",
        "torch counts a loaded step once for each parameter",
        "return {name: v.clone() if isinstance(v, Tensor) and not v.dim() else v for name, v in values.items()}",
        "return dict(values)",
        f"tests/test_state_dict.py {PLAIN}",
    ),
    Mutant(
        "codes of another version are read",
        "a checkpoint of a later release is misread",
        'if saved["version"] != CODES_VERSION:',
        'if saved["version"] > CODES_VERSION + 1:',
        f"tests/test_saved_state.py {PLAIN}",
    ),
    Mutant(
        "a checkpoint that lacks a state is taken",
        "training goes on with a moment of 0",
        "if missing := sorted(needed - state.keys()):",
        "if missing := sorted(needed - needed):",
        f"tests/test_saved_state.py {PLAIN}",
    ),
    Mutant(
        "master copies take no memory",
        "the report promises what is not there",
        'sums["corrections"] += nbytes(codec.dtypes[1:], codec.each[1:], numel)',
        'sums["corrections"] += 0 if codec.name == "master" else nbytes(codec.dtypes[1:], codec.each[1:], numel)',
        f"tests/test_codecs.py {PLAIN}",
    ),
    Mutant(
        "master copies are not moved",
        "explain() and the audit's floor count too few bytes",
        'unread = param.dtypes[0].itemsize if param.name == "master" else 0',
        'unread = sum(dtype.itemsize for dtype in param.dtypes) if param.name == "master" else 0',
        f"tests/test_codecs.py tests/test_dispatch.py {PLAIN}",
    ),
    Mutant(
        "an error does not say what to do",
        "its reader has to guess",
        ' Make it a parameter of its own (p.clone())."',
        '"',
        "tests/test_errors.py -k every_message",
    ),
    Mutant(
        "the audit counts no masked access",
        "a kernel twice as slow passes",
        "masked_accesses=sum(x.guarded for x in accesses)",
        "masked_accesses=0",
        "tests/test_audit.py tests/test_audit_assembly.py -k 'mask or full_chunk or mutation'",
    ),
    Mutant(
        "the audit minds no masked access",
        "a kernel twice as slow passes",
        'in the full-chunk branch": m.masked_accesses == 0',
        'in the full-chunk branch": m.masked_accesses >= 0',
        "tests/test_audit.py tests/test_audit_assembly.py -k 'mask or full_chunk or mutation'",
    ),
    Mutant(
        "the audit sees no predicate",
        "a kernel twice as slow passes",
        "guarded=guard is not None,",
        "guarded=False,",
        "tests/test_audit.py tests/test_audit_assembly.py -k 'mask or full_chunk or mutation'",
    ),
    Mutant(
        "a benchmark's ratio is of means",
        "one disturbed run decides it",
        "return statistics.median(self.samples(side))",
        "return statistics.mean(self.samples(side))",
        "tests/test_bench.py -k 'not run'",
    ),
    Mutant(
        "a result of NaN agrees with anything",
        "a time of wrong results is printed",
        "return not self.error and self.share <= self.allowed",
        "return not self.error and not self.share > self.allowed",
        "tests/test_bench.py -k 'agree'",
    ),
    # Optimizers that are driven by a closure, and matrices.
    Mutant(
        "the line search takes any step that decreases at all",
        "L-BFGS takes ever smaller steps",
        "return point.loss <= start.loss + c1 * point.t * start.slope",
        "return point.loss <= start.loss",
        "tests/test_closure_driven.py tests/test_scaled_problems.py",
    ),
    Mutant(
        "L-BFGS drops its newest pair",
        "its direction is of another point",
        "self.spare = self.order.pop(0) if len",
        "self.spare = self.order.pop() if len",
        "tests/test_closure_driven.py",
    ),
    Mutant(
        "conjugate gradients never restart by Powell's test",
        "directions that are hardly conjugate are kept",
        "if slope >= 0 or abs(gb) >= ORTHOGONAL * gg * ratio:",
        "if slope >= 0:",
        "tests/test_closure_driven.py tests/test_scaled_problems.py",
    ),
    Mutant(
        "Muon's iteration lacks its last term",
        "singular values do not come near one",
        "polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)",
        "polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=0.0)",
        f"tests/test_muon.py {PLAIN}",
    ),
)
