"""Closures, matrices, what is measured of parameters, wrappers, offloading, trainers."""

from .mutant import Mutant

MUTANTS = (
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
        "cautious decay spares what does not move",
        "weights whose update is 0 keep their size, which the paper lets decay",
        "return where(opposite(-step, p), p, p * w.keep) + step, *states",
        "return where(opposite(step, p), p * w.keep, p) + step, *states",
        "tests/test_wrappers.py::test_each_is_as_in_float64[eager-torch.float32-cautious_decay]",
    ),
    Mutant(
        "NovoGrad averages its first gradient with nothing",
        "what has no gradient in its first step, as LoRA's A, takes one seven times too long",
        "torch.where(known == 0, squares, h.beta2 * known + h.one_minus_beta2 * squares)",
        "h.beta2 * known + h.one_minus_beta2 * squares",
        "tests/test_accuracy.py::test_gradients_that_begin_with_0_or_later_and_are_missing[NovoGrad-default]",
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
        "views of a gradient are kept for the next step",
        "offloaded parameters are stepped by gradients that were",
        """        self.given = None
        self._lain = {}

    def part""",
        """        self.given = None

    def part""",
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
