"""Steps as Triton compiles them for sm_90, executed by a machine for its code, beside eager ones.

Without contraction to fused multiply-adds, and with the nearest number for each approximate result, a compiled step is
the eager one bit for bit: the tolerance is zero, so that a wrong mask, offset, rounding or random bit cannot hide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is what compiles the kernels")
import triton.language as tl
from compiled_steps import (
    BF16,
    CODED_NUMELS,
    F16,
    F32,
    F64,
    KEPT,
    NUMELS,
    Training,
    differing,
    errors,
    executing,
    rounded_once,
    unfused,
)
from ptx_machine.executor import Executor
from table import CASES, KINDS, Case, rows

import triton_optim
from triton_optim.backends.norms import partial_norms
from triton_optim.buckets.gradient_norm import Norm, norm_from, on_one_device
from triton_optim.kernels.language import PRIMITIVES, jit, maximum, minimum, sign, where
from triton_optim.spec import State

pytestmark = pytest.mark.compiled
ELEMENTWISE = [case for case in CASES if case.elementwise and not case.sparse]
# In bfloat16 one of each kind.
EVERY_RULE = [
    pytest.param(case, name, dtype, id=f"{case.name}-{name}-{dtype}")
    for case in ELEMENTWISE
    for name in case.variants
    for dtype in (F32, BF16)
    if dtype == F32 or case in KINDS
]


@pytest.fixture
def machine() -> Iterator[Executor]:
    """Executes the launches of a test, none of which may be faulty."""
    with executing() as executor:
        yield executor
    assert executor.launches
    assert not executor.faults


@pytest.mark.parametrize(("case", "variant", "dtype"), EVERY_RULE)
def test_every_rule(case: Case, variant: str, dtype: torch.dtype, machine: Executor) -> None:
    # RAdam divides by a root from its sixth step on.
    training = Training(case.ours, case.variants[variant], dtype, steps=6 if case.name == "RAdam" else 2)
    with unfused():
        assert not differing(training.run("triton"), training.eagerly())


@pytest.mark.parametrize("kept", KEPT)
def test_every_codec(kept: str, machine: Executor) -> None:
    dtype, options = KEPT[kept]
    training = Training(triton_optim.AdamW, {"amsgrad": True} | options, dtype, CODED_NUMELS)
    with unfused():
        assert not differing(training.run("triton"), training.eagerly())


@pytest.mark.parametrize("kept", ["fp32", "bf16 stochastic"])
def test_every_tail_of_1_to_1027_elements(kept: str, machine: Executor) -> None:
    dtype, options = KEPT.get(kept, (F32, {}))
    training = Training(triton_optim.AdamW, options, dtype, tuple(range(1, 1028)), steps=1)
    with unfused():
        assert not differing(training.run("triton"), training.eagerly())


MISALIGNED = {"fp32": (F32, {}), "bf16": (BF16, {})}
MISALIGNED |= {
    name: KEPT[name] for name in ("fp64", "bf16 split32", "fp32, states int8", "fp16 stochastic, states int4")
}


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("kept", MISALIGNED)
def test_misaligned_views(kept: str, offset: int, machine: Executor) -> None:
    dtype, options = MISALIGNED[kept]
    training = Training(triton_optim.AdamW, options, dtype, CODED_NUMELS, offset=offset)
    with unfused():
        assert not differing(training.run("triton"), training.eagerly())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -3e38])
@pytest.mark.parametrize("kept", ["fp32, states bf16", "fp32, states int8", "fp32, states int4", "bf16 split24"])
def test_what_is_not_finite_stays_where_it_is(kept: str, bad: float, machine: Executor) -> None:
    dtype, options = KEPT[kept]
    training = Training(triton_optim.AdamW, options, dtype, CODED_NUMELS, bad=bad)
    with unfused():
        assert not differing(training.run("triton"), training.eagerly())


@pytest.mark.parametrize("scale", [1e-18, 1e-22])
def test_squares_of_gradients_that_are_subnormal_or_zero(scale: float, machine: Executor) -> None:
    training = Training(triton_optim.AdamW, {"eps": 0.0 if scale == 1e-18 else 1e-30}, scale=scale)
    with unfused():
        ours = training.run("triton")
        assert not differing(ours, training.eagerly())
    assert ours["4.p"].isfinite().float().mean() > 0.99  # some squares are 0


@rows(*(case for case in CASES if not case.elementwise))
def test_rules_after_a_prologue(case: Case, machine: Executor) -> None:
    """What comes before the rule is torch's, in float32, on both sides; but for products of matrices by Triton, and
    for sums over a parameter, which are taken in another order.
    """
    ends = []
    for backend in ("triton", "eager"):
        params = case.parameters()
        optimizer = case.ours(params, **case.settings, backend=backend)
        for step in range(2):
            random = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = case.gradient(p, random)
            with unfused(), rounded_once():
                optimizer.step()
        ends.append({str(i): p.detach() for i, p in enumerate(params)})
    if all(variant.measure is None for variant in case.ours.variants):
        assert not differing(*ends)
    for name, p in ends[0].items():
        torch.testing.assert_close(p, ends[1][name], rtol=1e-6, atol=1e-7)


# Rows of scalars.


def capturable(case: Case) -> bool:
    return "capturable" in case.defaults()


@pytest.mark.parametrize(
    "case", [case for case in KINDS if capturable(case) and case in ELEMENTWISE], ids=lambda case: case.name
)
def test_rows_formed_on_the_device(case: Case, machine: Executor) -> None:
    """In float64, of which float32 keeps so little that no last place is another."""
    options = case.variants[list(case.variants)[-1]]
    training = Training(case.ours, options, numels=(7, 1027), steps=6 if case.name == "RAdam" else 3)
    with unfused():
        ours = training._replace(options=options | {"capturable": True}).run("triton")
    assert machine.launches.count("form_rows") == training.steps
    kept = [{name: x.float() for name, x in end.items()} for end in (ours, training.eagerly())]
    assert not differing(*kept)


def test_rows_with_random_bits_formed_on_the_device(machine: Executor) -> None:
    dtype, options = KEPT["bf16 stochastic"]
    training = Training(triton_optim.AdamW, options | {"seed": 2**40 + 3}, dtype)
    with unfused():
        ours = training._replace(options=training.options | {"capturable": True}).run("triton")
    assert "form_rows" in machine.launches
    assert not differing(ours, training.eagerly())


def test_several_rows(machine: Executor) -> None:
    """Groups with learning rates of their own, which go as a table; one row goes as arguments."""
    ends = []
    for backend in ("triton", "eager"):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (1027, 5, 1024)]
        groups = [{"params": [p], "lr": 10.0**-i} for i, p in enumerate(params, 1)]
        optimizer = triton_optim.SGD(groups, momentum=0.9, backend=backend)
        for _ in range(2):
            for p in params:
                p.grad = torch.linspace(1, -2, p.numel())
            with unfused(), rounded_once():
                optimizer.step()
        ends.append({str(i): p.detach() for i, p in enumerate(params)})
    assert not differing(*ends)


# Norms, clipping and AMP.

# A square is rounded once; then it is one of 16 summands in its place, and 1,024 places are added up in 10 steps.
NORM_ERROR = 27 * 2.0**-24


# Powers are computed in float64 from every dtype, and take the machine ten seconds.
@pytest.mark.parametrize(
    ("dtype", "order"), [*itertools.product((F32, BF16, F16, F64), (1.0, 2.0, math.inf)), (F32, 3.0)], ids=str
)
def test_norms(dtype: torch.dtype, order: float, machine: Executor) -> None:
    gradients = [torch.randn(n).to(dtype) for n in (1, 7, 1024, 1027, 20000)]
    norm = Norm(order)
    sums = on_one_device(partial_norms(gradients, norm, "triton"), torch.device("cpu"))
    exact = torch.linalg.vector_norm(torch.cat(gradients).double(), order)
    wide = dtype == F64 or norm.kind == "p"  # then within a few ulp of float64, after exp and log
    torch.testing.assert_close(norm_from(sums, norm), exact, rtol=1e-12 if wide else NORM_ERROR, atol=0)
    assert not sums[:, 1].any()
    gradients[3][1026] = math.nan
    sums = on_one_device(partial_norms(gradients, norm, "triton"), torch.device("cpu"))
    assert norm_from(sums, norm).isnan()
    assert sums[:, 1].any()


@pytest.mark.parametrize("kept", ["fp32, average", "bf16 split32, average"])
def test_clipping_and_an_average(kept: str, machine: Executor) -> None:
    dtype, options = KEPT[kept]
    training = Training(triton_optim.AdamW, options | {"max_grad_norm": 1.0}, dtype)
    with unfused():
        ours = training.run("triton")
    assert "partial_norms" in machine.launches
    for name, expected in training.eagerly().items():
        # A gradient is off by as much as the norm, its square by twice that, and what is stored by a rounding to 8
        # bits where it has so many. Adam's update is the quotient of a gradient and the root of a square.
        rounded = 2.0**-8 if ours[name].dtype == BF16 else 2.0**-24
        tolerance = {"rtol": 2 * NORM_ERROR + 2 * rounded, "atol": 1e-9}
        if not name.endswith("residual") and not name.endswith("residual_low"):
            torch.testing.assert_close(ours[name], expected, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_amp_skips_a_step_with_an_infinity(machine: Executor) -> None:
    ends = []
    for backend in ("triton", "eager"):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 1027))
        optimizer = triton_optim.AdamW([p], lr=1e-2, amp="fused", ema_decay=0.9, backend=backend)
        optimizer.grad_scale, optimizer.found_inf = torch.full((1,), 1024.0), torch.zeros(1)
        for infinite in (0.0, 1.0, 0.0):
            optimizer.found_inf.fill_(infinite)
            p.grad = torch.linspace(3000, -2000, 1027)
            before = p.detach().clone()
            with unfused(), rounded_once():
                optimizer.step()
            assert torch.equal(before, p.detach()) == bool(infinite)
        ends.append({"p": p.detach(), **{k: v for k, v in optimizer.state[p].items() if k != "step"}})
        assert optimizer.state[p]["step"] == 2
    assert not differing(*ends)  # by a power of two


# What a GPU rounds in other ways.


@rows(*ELEMENTWISE)
def test_fused_steps_are_as_exact_as_eager_ones(case: Case, machine: Executor) -> None:
    """A fused multiply-add rounds once where eager steps round twice, and what cancels may cancel in another way."""
    training = Training(case.ours, case.settings, numels=(1027, 2048), steps=6)
    ours, eager, exact = training.run("triton"), training.eagerly(), training.exactly()
    theirs = errors(eager, exact)
    for role, error in errors(ours, exact).items():
        assert error <= 2 * theirs[role] + 1e-12, f"{role}: {error:.3g}, eager {theirs[role]:.3g}"


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "NAdam", "RMSprop"])
def test_quotients_that_are_off_by_what_ptx_allows(name: str, seed: int, machine: Executor) -> None:
    """div.full.f32 may be 2 ulp off. No state of these is a quotient, and a parameter is off by that of its update."""
    case = next(case for case in ELEMENTWISE if case.name == name)
    training = Training(case.ours, {"lr": 1e-2}, numels=(1027,), steps=1)
    machine.seed = seed
    with unfused():
        ours = training.run("triton")
    eager = training.eagerly()
    start = training._replace(steps=0).run("eager")["0.p"]
    assert 0 < differing(ours, eager).pop("0.p", 0) < 1027
    assert differing(ours, eager).keys() <= {"0.p"}
    update = (eager["0.p"] - start).abs()
    # 2 ulp are at most 2^-22 of the quotient; p itself is rounded once more.
    allowed = update * 2.0**-22 + eager["0.p"].abs() * 2.0**-23
    assert ((ours["0.p"] - eager["0.p"]).abs() <= allowed).all()


class Numbers(NamedTuple):
    lr: float
    a: float


@jit
def of_numbers(p, g, m, h):
    """Numbers with names, numbers alone in a word, conditions on scalars and as numbers."""
    beta, none = 0.99999, h.a == 0
    m = beta * m + (1 - beta) * where(none, m, g)
    step = where(g > 0, 0.1, h.a) + maximum(m, 0.3) * sign(g) * 0.7
    return p - h.lr * where(~none & (g > 0), step, 0.2) - (g > p) * 0.1, minimum(h.a, m)


class OfNumbers(triton_optim.RuleOptimizer):
    rule = of_numbers
    states = (State("m"),)

    def __init__(self, params: Any, a: float = 0.3, **options: Any) -> None:
        super().__init__(params, {"lr": 0.1, "a": a}, **options)

    def scalars(self, group: dict[str, Any], step: Any) -> Numbers:
        return Numbers(group["lr"], group["a"])


@pytest.mark.parametrize("options", [{}, {"a": 0.0}, {"state_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_numbers_in_a_rule(dtype: torch.dtype, options: dict[str, Any], machine: Executor) -> None:
    training = Training(OfNumbers, options, dtype, CODED_NUMELS if "state_dtype" in options else NUMELS)
    with unfused():
        assert not differing(training.run("triton"), training.eagerly())


@triton.jit
def apply_word(x, y, out, WORD: tl.constexpr, ARGUMENTS: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    if ARGUMENTS == 2:
        tl.store(out + i, WORD(tl.load(x + i), tl.load(y + i)))
    else:
        tl.store(out + i, WORD(tl.load(x + i)))


# exp is ex2.approx, within 2 ulp, of x times log2(e), of which half an ulp is up to 2^-18 of the result: the exponent
# is at most 128. log is a polynomial within 1 ulp, after which comes a rounding.
WORDS = {"abs": 0.0, "exp": 2.0**-22 + 2.0**-18, "floor": 0.0, "log": 2.0**-22, "sign": 0.0, "sqrt": 0.0}
WORDS |= {"maximum": 0.0, "minimum": 0.0}


@pytest.mark.parametrize("word", WORDS)
def test_words_of_rules(word: str, machine: Executor) -> None:
    in_triton, in_torch, _ = PRIMITIVES[word]
    arguments = 2 if word in ("maximum", "minimum") else 1
    special = [0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 1e-30, -1e30, math.inf, -math.inf, math.nan, 1e-42, 80.0, -80.0]
    x = torch.cat([torch.tensor(special), torch.randn(1010) * torch.logspace(-37, 37, 1010)])
    y = x.flip(0) if word == "maximum" else x.roll(1)
    out = torch.full_like(x, 7.0)
    apply_word[(1,)](x, y, out, in_triton, arguments, 1024, enable_fp_fusion=True)
    given = (x.double(), y.double())[:arguments]
    expected = in_torch(*given).float()
    normal = expected.abs() >= torch.finfo(F32).smallest_normal
    exact = WORDS[word] == 0
    # An approximate result that is subnormal is flushed to 0.
    torch.testing.assert_close(out[normal | exact], expected[normal | exact], rtol=WORDS[word], atol=0, equal_nan=True)


# Other GPUs.


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize("kept", ["bf16 stochastic", "fp32, states int8"])
def test_other_architectures(target: str, kept: str) -> None:
    dtype, options = KEPT[kept]
    training = Training(triton_optim.AdamW, options, dtype, CODED_NUMELS)
    with executing(target) as machine, unfused():
        assert not differing(training.run("triton"), training.eagerly())
    assert not machine.faults
