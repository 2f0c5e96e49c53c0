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
        test: that should notice it, as pytest calls it.
    """

    name: str
    matters: str
    old: str
    new: str
    test: str


@cache
def sources() -> dict[Path, str]:
    """The code."""
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    files = (path for path in files if ROOT / "triton_optim/kernels" not in path.parents)  # in an sdist, the same again
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


MUTANTS = (
    # Rules.
    Mutant(
        "Adam's bias correction is of another step",
        "the first steps of Adam are too long or too short",
        "correction=(1 - beta2**step) ** -0.5,\n        eps",
        "correction=(1 - beta2 ** (step + 1)) ** -0.5,\n        eps",
        "tests/test_accuracy.py::test_error_is_no_larger_than_torchs[eager-AdamW-default-torch.float32]",
    ),
    Mutant(
        "AdamW decays after the update",
        "the update is decayed, too",
        "return descend(p * h.decay, exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq",
        "return descend(p, exp_avg, exp_avg_sq, h) * h.decay, exp_avg, exp_avg_sq",
        "tests/test_accuracy.py::test_error_is_no_larger_than_torchs[eager-AdamW-default-torch.float64]",
    ),
    Mutant(
        "AMSGrad divides by the newest moment",
        "it is Adam",
        "return descend(p * h.decay, exp_avg, max_exp_avg_sq, h)",
        "return descend(p * h.decay, exp_avg, exp_avg_sq, h)",
        "tests/test_accuracy.py::test_error_is_no_larger_than_torchs[eager-AdamW-amsgrad-torch.float32]",
    ),
    Mutant(
        "Lion takes the sign of the next momentum",
        "the gradient of this step hardly counts",
        "update = sign(h.beta1 * exp_avg + h.one_minus_beta1 * g)",
        "update = sign(h.beta2 * exp_avg + h.one_minus_beta2 * g)",
        "tests/test_accuracy.py::test_error_is_no_larger_than_torchs[eager-Lion-default-torch.float32]",
    ),
    Mutant(
        "NAdam looks ahead by the momentum of this step",
        "Nesterov's part is of the wrong weight",
        "momentum(group, step), momentum(group, step + 1)",
        "momentum(group, step), momentum(group, step)",
        "tests/test_accuracy.py::test_error_is_no_larger_than_torchs[eager-NAdam-default-torch.float32]",
    ),
    Mutant(
        "RAdam divides 0 by 0 while the variance can't be told",
        "the derivative by a learned rate is NaN",
        'eps=group["eps"] + 1.0 * plain,',
        'eps=group["eps"],',
        "tests/test_eager.py::test_gradient_of_radams_learning_rate_where_the_variance_can_not_be_told",
    ),
    Mutant(
        "Rprop goes on by a gradient of another sign",
        "it steps back over a minimum it has just passed, with a step that was cut",
        "g = where(agreement < 0, 0.0, g)",
        "g = where(agreement < 0, g, g)",
        "tests/test_accuracy.py::test_error_is_no_larger_than_torchs[eager-Rprop-default-torch.float32]",
    ),
    Mutant(
        "SGD leaves Nesterov's gradient out",
        "Nesterov's form is plain momentum",
        "return p - h.lr * (g + h.nesterov * momentum_buffer), momentum_buffer",
        "return p - h.lr * momentum_buffer, momentum_buffer",
        "tests/test_accuracy.py::test_error_is_no_larger_than_torchs[eager-SGD-nesterov-torch.float32]",
    ),
    Mutant(
        "centred RMSprop takes the root of a rounding error",
        "equal gradients make parameters NaN",
        "return sqrt(where(variance < 0, 0.0, variance))",
        "return sqrt(variance)",
        "tests/test_infinities.py::test_equal_gradients_have_no_deviation_below_0[eager]",
    ),
    Mutant(
        "a decay of 0 touches infinite parameters",
        "a mask of -inf becomes NaN",
        "return where(l2 == 0, g, g + l2 * p)",
        "return g + l2 * p",
        "tests/test_infinities.py::test_parameters_and_gradients_that_are_not_finite[eager-SGD]",
    ),
    Mutant(
        "Adagrad's rate decays from the first step on",
        "it is behind torch's by a step",
        'lr = group["lr"] / (1 + (step - 1) * group["lr_decay"])',
        'lr = group["lr"] / (1 + step * group["lr_decay"])',
        "tests/test_accuracy.py::test_error_is_no_larger_than_torchs[eager-Adagrad-decays-torch.float32]",
    ),
    Mutant(
        "ASGD begins to average a step late",
        "the average is another one than torch's",
        'lr, late = group["lr"], step - group["t0"]',
        'lr, late = group["lr"], step - group["t0"] - 1',
        "tests/test_accuracy.py::test_states_match_the_reference[eager-ASGD-averaged]",
    ),
    Mutant(
        "Adafactor does not clip",
        "one wild gradient moves everything",
        "torch._foreach_clamp_min(clips, 1.0)",
        "torch._foreach_clamp_min(torch._foreach_mul(clips, 0.0), 1.0)",
        "tests/test_accuracy.py::test_error_is_no_larger_than_torchs[eager-Adafactor-default-torch.float32]",
    ),
    # How values are kept.
    Mutant(
        "the scale of int4 codes is rounded to the nearest",
        "the largest of a block is cut off",
        "bitcast_to_float((bitcast_to_int(scale) + 0xFF00) & -0x10000)",
        "bitcast_to_float((bitcast_to_int(scale) + 0x8000) & -0x10000)",
        "tests/test_codec_properties.py::test_a_code_is_a_neighbour_of_its_value",
    ),
    Mutant(
        "int8 codes are cut, not rounded",
        "moments shrink with every step",
        "part = 0.5",
        "part = 0.0",
        "tests/test_codec_properties.py::test_a_code_is_a_neighbour_of_its_value",
    ),
    Mutant(
        "a second moment may be kept as 0",
        "its root is divided by",
        "where(x > 0, where(k < 1, 1.0, k), 0.0)",
        "where(x > 0, k, 0.0)",
        "tests/test_codes_and_corrections.py::test_what_is_never_negative_is_0_only_where_it_was",
    ),
    Mutant(
        "split32 loses its lowest byte",
        "training is not that of float32",
        "value = bitcast_to_float(bitcast_to_int(parts[0]) + (parts[1] << 8) + (parts[2] & 0xFF))",
        "value = bitcast_to_float(bitcast_to_int(parts[0]) + (parts[1] << 8))",
        "tests/test_codes_and_corrections.py::test_split32_of_bfloat16_is_exact",
    ),
    Mutant(
        "Kahan's compensation is of the other sign",
        "roundings add up twice as fast",
        'parts = (p, where(abs(p) < float("inf"), x - p, 0.0))',
        'parts = (p, where(abs(p) < float("inf"), p - x, 0.0))',
        "tests/test_codec_properties.py::test_what_is_kept_is_near",
    ),
    Mutant(
        "a tensor of just 4,096 elements is not quantized",
        "a promise of the docs is off by one",
        "local(p).numel() < MIN_QUANTIZED_NUMEL",
        "local(p).numel() <= MIN_QUANTIZED_NUMEL",
        "tests/test_codecs.py::test_what_keeps_full_precision[eager]",
    ),
    Mutant(
        "stochastic rounding is to the nearest",
        "small updates are lost",
        "bitcast_to_float((bitcast_to_int(x) + where(abs(x) < 3.3895313892515355e38, bits, 0)) & -0x10000)",
        "bitcast_to_float((bitcast_to_int(x) + where(abs(x) < 3.3895313892515355e38, 0x8000, 0)) & -0x10000)",
        "tests/test_stochastic_rounding.py::test_mean_is_exact",
    ),
    Mutant(
        "what is finite may be rounded to infinity",
        "the largest numbers of bfloat16 become Inf",
        "where(abs(x) < 3.3895313892515355e38, bits, 0)",
        "bits",
        "tests/test_stochastic_rounding.py::test_what_is_finite_stays_finite",
    ),
    Mutant(
        "a parameter and its state share random bits",
        "their roundings are correlated",
        "if ROLE % 2 == 0:",
        "if ROLE % 2 != 2:",
        "tests/test_stochastic_rounding.py::test_bits_depend_on_seed_step_parameter_role_and_element",
    ),
    Mutant(
        "random bits do not depend on the step",
        "every step rounds an element the same way",
        "return mixed(mixed(mixed(low) + high) + step)",
        "return mixed(mixed(low) + high)",
        "tests/test_stochastic_rounding.py::test_bits_depend_on_seed_step_parameter_role_and_element",
    ),
    # Averages.
    Mutant(
        "an average's end leaves a trace of its start",
        "a NaN of long ago stays in the average though its decay is 0",
        "return where(weight == 1, end, where(start == end, end, between))",
        "return where(start == end, end, between)",
        "tests/test_infinities.py::test_an_average_of_infinities_is_theirs[eager]",
    ),
    Mutant(
        "an average does not reach its end exactly",
        "with a small decay it is off by a rounding of the difference",
        "between = where(weight < 0.5, start + weight * difference, end - difference * (1 - weight))",
        "between = start + weight * difference",
        "tests/test_averaging.py::test_the_average_keeps_no_rounding_of_a_large_start[eager]",
    ),
    Mutant(
        "the warm-up of an average is of another length",
        "early averages are not those of the docs",
        "decay = min(decay, (1 + count) / (10 + count))",
        "decay = min(decay, (1 + count) / (11 + count))",
        "tests/test_averaging.py::test_warmup_lets_the_decay_rise[eager-0.99]",
    ),
    Mutant(
        "a checkpoint in evaluation mode looks like one of the weights",
        "a distributed checkpoint goes on from averages, as if they were the weights",
        "            state[AVERAGE] = {name: state.pop(name) for name in (AVERAGE, WEIGHTS)}\n",
        "            pass\n",
        "tests/test_train_and_eval.py::test_a_distributed_checkpoint_says_that_it_lacks_the_average",
    ),
    Mutant(
        "a loaded optimizer does not know that its parameters are averages",
        "train() leaves the averages where they are, and training goes on from them",
        "        self.engine.swapped = swapped_as_saved(self)\n",
        "",
        "tests/test_train_and_eval.py::test_a_checkpoint_in_evaluation_mode_goes_on_from_the_weights[state dict-plain]",
    ),
    # Clipping, norms and gradient scaling.
    Mutant(
        "clipping divides by the norm alone",
        "a norm of 0 under a limit of 0 makes NaN, and it is not torch's factor",
        "return (max_norm / (norm + 1e-6)).clamp(max=1.0)",
        "return (max_norm / norm).clamp(max=1.0)",
        "tests/test_clipping.py::test_torchs_epsilon_is_beside_the_norm",
    ),
    Mutant(
        "the kernel's clipping divides by the norm alone",
        "steps on a GPU are not those on a CPU",
        "clip = tl.load(max_norm) / (norm + 1e-6)",
        "clip = tl.load(max_norm) / norm",
        "tests/test_amp.py::test_a_norm_as_small_as_torchs_epsilon_is_clipped_by_torchs_factor[triton]",
    ),
    Mutant(
        "a skipped step is not skipped where a norm is taken",
        "an overflow of float16 training makes everything NaN",
        "skip = (faults != 0).to(wide)",
        "skip = (faults < 0).to(wide)",
        "tests/test_amp.py::test_of_two_optimizers_only_the_one_with_infinities_is_skipped",
    ),
    Mutant(
        "the kernel counts no fault",
        "an overflow on a GPU is not noticed",
        'faults += tl.where(x < float("inf"), 0, 1)',
        'faults += tl.where(x <= float("inf"), 0, 1)',
        "tests/test_clipping.py::test_an_element_that_is_not_finite_is_told_and_stays_in_the_norm[triton-0-inf-2.0]",
    ),
    Mutant(
        "the norm is of gradients with their scale",
        "clipping depends on the loss scale",
        "norm = norm_from(partials, EUCLIDEAN) * factor",
        "norm = norm_from(partials, EUCLIDEAN)",
        "tests/test_amp.py::test_grad_norm_is_of_gradients_without_their_scale[eager]",
    ),
    Mutant(
        "a caller's own gradient scale is forgotten",
        "gradients that were scaled besides are too large",
        'optimizer.grad_scale = scale * getattr(optimizer, "grad_scale", 1)',
        "optimizer.grad_scale = scale",
        "tests/test_amp.py::test_what_the_caller_has_scaled_by_besides_is_taken_out_too",
    ),
    Mutant(
        "a NaN on one rank is lost in the largest magnitude",
        "sharded training goes on from NaN",
        "row[0].masked_fill(row[2] != 0, math.nan)",
        "row[0]",
        "tests/test_two_ranks.py::test_a_nan_on_one_rank_is_in_the_largest_magnitude",
    ),
    # Memory, plans and what a step takes note of.
    Mutant(
        "slices that touch are taken to overlap",
        "parameters in one buffer, as of most sharding, run one by one",
        "if start < reach[0]:",
        "if start <= reach[0]:",
        "tests/test_alignment_and_sharing.py::test_parameters_that_share_storage_are_updated_in_turn",
    ),
    Mutant(
        "a plan holds for other parameters",
        "a parameter that was replaced is not stepped",
        "return len(params) == len(self.params) and all(map(is_, params, self.params))",
        "return len(params) == len(self.params)",
        "tests/test_capture.py::test_a_model_that_changed_after_its_capture_is_refused",
    ),
    Mutant(
        "a gradient of another shape is not noticed",
        "a kernel reads past its end",
        "or g.shape != value.shape:",
        "or g.dim() != value.dim():",
        "tests/test_errors.py::test_gradient_that_would_only_broadcast",
    ),
    Mutant(
        "an address counts as aligned at 8 bytes",
        "a GPU faults on a view",
        "return bits % 16 == 0",
        "return bits % 8 == 0",
        "tests/test_alignment_and_sharing.py::test_alignment_is_a_multiple_of_16_bytes",
    ),
    Mutant(
        "gathered gradients may have another dtype",
        "bits of one dtype are read as another's",
        "if (g->dtype() != bucket.dtype || !alike",
        "if (!alike",
        "tests/test_gather.py::test_what_happens_between_steps_is_noticed",
    ),
    Mutant(
        "a state that a user replaced is not noticed",
        "the step goes on from the old one",
        '"__ior__", "clear", "pop",',
        '"clear", "pop",',
        "tests/test_watched_state.py::test_a_state_that_was_replaced_is_used",
    ),
    Mutant(
        "hyperparameters may trade their names",
        "a step takes a number for another",
        "self.fixed and names == self.names",
        "self.fixed and len(names) == len(self.names)",
        "tests/test_hyperparameters.py::test_a_name_that_changed_is_read_anew",
    ),
    Mutant(
        "the compiled look at groups sees no hyperparameter",
        "a schedule's rates are not taken",
        "return 1 + same;",
        "return 2;",
        "tests/test_gather.py::test_what_happens_between_steps_is_noticed[change_rate-cpp]",
    ),
    Mutant(
        "the compiled look at groups sees no parameter",
        "a step takes parameters that have gone",
        "if (PyList_GetItem(own, j) != known.param[j]) return 0;",
        "if (PyList_GetItem(own, j) == nullptr) return 0;",
        "tests/test_gather.py::test_what_happens_between_steps_is_noticed[replace-cpp]",
    ),
    Mutant(
        "numbers that were read beside a step are taken for noted ones",
        "a rate that was changed and taken back is not the one that steps",
        "self._groups.forget_hyperparameters()",
        "pass",
        "tests/test_gather.py::test_numbers_that_were_read_and_taken_back_are_noticed",
    ),
    Mutant(
        "a plan that was made in inference mode serves outside of it",
        "a step fails halfway",
        "optimizer.max_grad_norm is None, torch.is_inference_mode_enabled()]",
        "optimizer.max_grad_norm is None]",
        "tests/test_memory_is_ours.py::test_a_tensor_of_inference_mode_is_refused",
    ),
    Mutant(
        "a step that is captured may lack a gradient",
        "replays never update that parameter",
        "if p.requires_grad and g is None:",
        "if not p.requires_grad and g is None:",
        "tests/test_capture.py::test_capturing_without_a_gradient_raises",
    ),
    Mutant(
        "complex parameters go to a kernel",
        "it has no such numbers",
        "if request.dtype.is_complex:",
        "if request.dtype == torch.complex128:",
        "tests/test_dispatch.py::test_choices",
    ),
    Mutant(
        "a gradient may arrive twice",
        "half of an accumulated gradient is lost without a word",
        "if id(p) in self._arrived:\n            raise",
        "if id(p) in self._hooks:\n            raise",
        "tests/test_gradient_release.py::test_two_backwards_without_a_step",
    ),
    # What is saved, told and reported.
    Mutant(
        "states that were saved in another dtype are loaded in the parameter's",
        "training in bfloat16 goes on from rounded moments",
        "state[name] = value.to(device, copy=value.dtype != dtype and not dtype.is_complex)",
        "state[name] = value.to(device, dtype)",
        "tests/test_state_dict.py::test_training_resumes_bit_for_bit_with_states_of_another_dtype",
    ),
    Mutant(
        "codes of another version are read",
        "a checkpoint of a later release is misread",
        'if saved["version"] != CODES_VERSION:',
        'if saved["version"] > CODES_VERSION + 1:',
        "tests/test_saved_state.py::test_codes_that_are_not_what_they_say",
    ),
    Mutant(
        "scales of values that were codes differ in the last bit",
        "a run that is resumed from sharded int8 states goes another way",
        "better = lost & (",
        "better = ~lost & lost & (",
        "tests/test_codec_properties.py::test_codes_of_values_that_were_read_of_codes_are_the_same[int8]",
    ),
    Mutant(
        "shards that are cut twice share random bits",
        "rounding errors of their elements go the same way",
        "shard = shard * size + place",
        "shard = place",
        "tests/test_sharded.py::test_no_element_has_the_random_bits_of_another[rows and columns]",
    ),
    Mutant(
        "a float32 copy of the weights before a checkpoint is kept",
        "what was loaded is lost at the first step",
        'if probe.left(p, "master", master)]',
        "if False]",
        "tests/test_two_ranks_checkpoints.py::test_a_checkpoint_goes_into_other_options",
    ),
    Mutant(
        "a checkpoint that lacks a state is taken",
        "training goes on with a moment of 0",
        "if missing := sorted(needed.difference(there)):",
        "if missing := sorted(needed.difference(needed)):",
        "tests/test_saved_state.py::test_a_state_that_lacks_anything_is_refused",
    ),
    Mutant(
        "master copies take no memory",
        "the report promises what is not there",
        'sums["corrections"] += nbytes(codec.dtypes[1:], codec.elements_per_item[1:], numel)',
        'sums["corrections"] += codec.name[0] != "m" and nbytes(codec.dtypes[1:], codec.elements_per_item[1:], numel)',
        "tests/test_codecs.py::test_the_report_is_what_is_there",
    ),
    Mutant(
        "master copies are not moved",
        "explain() and the audit's floor count too few bytes",
        'return self.nbytes - (self.dtypes[0].itemsize if self.name == "master" else 0)',
        'return self.nbytes - (sum(dtype.itemsize for dtype in self.dtypes) if self.name == "master" else 0)',
        "tests/test_codecs.py::test_bytes_moved",
    ),
    Mutant(
        "an error does not say what to do",
        "its reader has to guess",
        ' Make it a parameter of its own (p.clone())."',
        '"',
        "tests/test_messages.py::test_every_message_has_a_fix",
    ),
    Mutant(
        "the audit counts no masked access",
        "a kernel twice as slow passes",
        "masked_accesses=sum(x.guarded for x in accesses)",
        "masked_accesses=0",
        "tests/test_audit.py::test_the_audit_catches_a_mutation",
    ),
    Mutant(
        "the audit minds no masked access",
        "a kernel twice as slow passes",
        'in the full-chunk branch": m.masked_accesses == 0',
        'in the full-chunk branch": m.masked_accesses >= 0',
        "tests/test_audit.py::test_the_audit_catches_a_mutation",
    ),
    Mutant(
        "the audit sees no predicate",
        "a kernel twice as slow passes",
        "guarded=guard is not None,",
        "guarded=False,",
        "tests/test_audit.py::test_the_audit_catches_a_mutation",
    ),
    Mutant(
        "a benchmark's ratio is of means",
        "one disturbed run decides it",
        "return statistics.median(self.samples(side))",
        "return statistics.mean(self.samples(side))",
        "tests/test_bench.py::test_a_ratio_is_of_medians_and_its_range_of_rounds",
    ),
    Mutant(
        "a result of NaN agrees with anything",
        "a time of wrong results is printed",
        "return not self.error and self.share <= self.allowed",
        "return not self.error and not self.share > self.allowed",
        "tests/test_bench.py::test_nan_agrees_with_nothing_and_a_step_that_fails_says_why",
    ),
    # Optimizers that are driven by a closure, and matrices.
    Mutant(
        "the line search takes any step that decreases at all",
        "L-BFGS takes ever smaller steps",
        "return point.loss <= start.loss + c1 * point.t * start.slope",
        "return point.loss <= start.loss",
        "tests/test_nonlinear_cg.py::test_strong_wolfe_conditions_hold",
    ),
    Mutant(
        "L-BFGS drops its newest pair",
        "its direction is of another point",
        "self.spare = self.order.pop(0) if len",
        "self.spare = self.order.pop() if len",
        "tests/test_closure_driven.py::test_lbfgs_takes_torchs_path",
    ),
    Mutant(
        "conjugate gradients never restart by Powell's test",
        "directions that are hardly conjugate are kept",
        "if slope >= 0 or abs(gb) >= ORTHOGONAL * gg * ratio:",
        "if slope >= 0:",
        "tests/test_closure_driven.py::test_conjugate_gradients_need_at_most_twice_torchs_lbfgs",
    ),
    Mutant(
        "Muon's iteration lacks its last term",
        "singular values do not come near one",
        "z = product(gram, gram, c, b, gram, out=z)",
        "z = product(gram, gram, 0.0, b, gram, out=z)",
        "tests/test_muon.py::test_steps_are_the_references",
    ),
    Mutant(
        "all blocks of a fused weight have the factor of the whole",
        "the keys of a fused weight take steps of another length than they would alone",
        "self.shapes = [(n, wide) for rows, wide in zip(self._rows, columns, strict=True) for n in rows]",
        "self.shapes = [(sum(rows), wide) for rows, wide in zip(self._rows, columns, strict=True) for n in rows]",
        "tests/test_pieces.py::test_each_matrix_has_the_factor_of_its_shape[of other sizes-True-match_rms_adamw]",
    ),
    Mutant(
        "experts are one tall matrix",
        "experts are orthogonalized together",
        "return each * (prod(shape[:-2]) if batched else 1)",
        "return [sum(each) * prod(shape[:-2])] if batched else each",
        "tests/test_pieces.py::test_each_matrix_goes_where_it_goes_alone[experts-Muon]",
    ),
    Mutant(
        "a sphere's radius follows the parameter",
        "the norm is what rounding makes of it, step by step",
        "radius = torch.where(known > 0, known, squares.sqrt())",
        "radius = squares.sqrt()",
        "tests/test_constrained.py::test_the_norm_is_that_before_the_first_step[AdamH]",
    ),
    Mutant(
        "codes of a prologue are never written",
        "Muon's momentum is that of the first step for ever",
        "write(self.codec, self.parts, local(self.value), self.role, bits)",
        "pass",
        "tests/test_coded_prologue.py::test_steps_are_those_of_what_is_kept[int8-Muon]",
    ),
    Mutant(
        "a prologue's bfloat16 is rounded to the nearest",
        "momentum of small gradients stands still",
        'bits = bits_of_parameter(m.p, m.index, int(group.get("seed", 0)), step, local(m.p))',
        "bits = None",
        "tests/test_coded_prologue.py::test_bfloat16_is_rounded_stochastically",
    ),
    Mutant(
        "Muon's Gram matrix is never computed anew",
        "what rounding leaves in it grows until singular values are far above one",
        "GROWTH_AT_FIRST, GROWTH = 150, 20",
        "GROWTH_AT_FIRST, GROWTH = 1e9, 1e9",
        "tests/test_newton_schulz.py::test_singular_values_beside_torchs",
    ),
    Mutant(
        "sums over a parameter count what lies past its end",
        "trust ratios of tensors whose size is no multiple of 1,024 are wrong on a GPU",
        "own = found[i] if FULL else tl.where(there[FIRST[1]], found[i], 0.0)",
        "own = found[i]",
        "tests/test_measure.py::test_sums_are_those_of_float64[triton-torch.float32]",
    ),
    Mutant(
        "explain counts states that are not summed",
        "a step of NovoGrad seems to move a third more than it does",
        "before += sum(roles[i] for i in roles_read(key.variant.measure))",
        "before += sum(roles)",
        "tests/test_measure.py::test_explain_and_memory",
    ),
    Mutant(
        "sums over a parameter count what fills its last block",
        "trust ratios of tensors whose size is no multiple of 256 are wrong on a CPU",
        "{left} < {most} ? {left} : {most}",
        "{most}",
        "tests/test_measure.py::test_sums_are_those_of_float64[cpp-torch.float32]",
    ),
    Mutant(
        "a parameter takes the scalars of its group for its own",
        "LAMB is Adam, CautiousAdamW lacks its scale",
        "self._own_table[:, 1 + fields.index(name)] = values",
        "pass",
        "tests/test_measure.py::test_a_parameter_moves_by_its_own_scale[triton]",
    ),
    Mutant(
        "ranks do not add up what they measure",
        "each rank scales its part of a parameter by another trust ratio",
        "torch.distributed.all_reduce(total, group=mesh.get_group(dim))",
        "pass",
        "tests/test_two_ranks.py::test_whole_matrices_of_fully_sharded_parameters[LAMB]",
    ),
    Mutant(
        "a cautious optimizer moves what goes up the gradient",
        "it is the optimizer that it is around, scaled",
        "where(opposite(step, g), step * w.scale, 0.0), *states",
        "step * w.scale, *states",
        "tests/test_wrappers.py::test_each_is_as_in_float64[eager-torch.float32-cautious]",
    ),
    Mutant(
        "a wrapper decays weights that its base decays, too",
        "LAMB's ratio counts a decay that is not in its step",
        "return {**group, DECAY: 0.0} if wrapper.takes_decay and DECAY in group else group",
        "return group",
        "tests/test_wrappers.py::test_around_one_that_measures[eager]",
    ),
    Mutant(
        "a stretch is stepped before its gradients are on the host",
        "offloaded parameters are updated by what was in the memory before",
        "before=lambda number: arrivals[number](),",
        "before=int,",
        "tests/test_offload.py::test_steps_are_those_of_the_cpp_backend[AdamW]",
    ),
    Mutant(
        "what a device does next does not wait for offloaded parameters",
        "the next forward pass reads weights of which some are old",
        "current.wait_stream(self._back)",
        "pass",
        "tests/test_offload.py::test_streams_and_the_host_wait_for_each_other",
    ),
    Mutant(
        "offloaded parameters do not come over",
        "what a user writes into them is undone by the next step",
        "if twin.read and (averaged or twin.given is not None):",
        "if False:",
        "tests/test_offload.py::test_what_users_do_to_parameters_is_seen",
    ),
    # Trainers.
    Mutant(
        "what is set on a wrapper stays there",
        "with Lightning, max_grad_norm is changed without effect",
        "self.engine.max_grad_norm = None if value is None else float(value)",
        "self._max_grad_norm = None if value is None else float(value)",
        "tests/test_unwrap.py::test_what_is_set_on_lightnings_wrapper_reaches_the_optimizer",
    ),
    Mutant(
        "the weights of the end are put over the best model",
        "load_best_model_at_end loads another than the best",
        "if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):",
        "if True:",
        "tests/test_trainers.py::test_the_best_model_stays",
    ),
    Mutant(
        "gradients that accumulate are released",
        "all but the first gradient of a step are lost, or the step raises",
        "if self._accumulating or (self._asked is not None and self._asked()):",
        "if self._accumulating:",
        "tests/test_trainers.py::test_transformers_trainer_releases_gradients[3]",
    ),
)
