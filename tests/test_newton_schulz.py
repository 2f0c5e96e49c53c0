"""Muon's iteration judged by singular values in float64, beside torch's: in a Gram matrix, in halves, in bfloat16."""

import copy
import io
import math

import pytest
import torch
from conftest import TORCHS_ITERATION
from torch import Tensor
from torch.nn import Parameter
from torch.utils.flop_counter import FlopCounterMode

import triton_optim
from triton_optim.optimizers.matrix import newton_schulz as module
from triton_optim.optimizers.matrix import symmetric_product as products
from triton_optim.optimizers.matrix.newton_schulz import PRESETS, newton_schulz, phases, triples

QUINTIC = (3.4445, -4.7750, 2.0315)
SPEEDRUN = [
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]  # fmt: skip
CONVERGENT = (15 / 8, -10 / 8, 3 / 8)

ROWS = 48
SPECTRA = {
    "random": None,
    "1e-6 to 1": torch.logspace(-6, 0, ROWS, dtype=torch.float64),
    "1e-3 to 1": torch.logspace(-3, 0, ROWS, dtype=torch.float64),
    "rank 4": torch.cat([torch.ones(4), torch.zeros(ROWS - 4)]).double(),
    "one of 1, the others 1e-3": torch.cat([torch.ones(1), torch.full((ROWS - 1,), 1e-3)]).double(),
}


def matrix(spectrum: str, ratio: int, rows: int = ROWS) -> Tensor:
    """Of these singular values and random singular vectors."""
    values = SPECTRA[spectrum]
    if values is None:
        return torch.randn(rows, rows * ratio)
    u, _ = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(rows * ratio, rows, dtype=torch.float64))
    return ((u * values) @ v.T).float()


def exact(m: Tensor, coefficients: list) -> Tensor:
    """What the steps make of the singular values, by a decomposition in float64."""
    u, values, v = torch.linalg.svd(m.double() / m.double().norm(), full_matrices=False)
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    return (u * values) @ v


def ours(m: Tensor, coefficients: object, steps: int) -> Tensor:
    with torch.no_grad():
        (x,) = newton_schulz([m], coefficients, steps, 1e-7, [1.0])  # type: ignore[arg-type]
    return x


def ours_and_torchs(m: Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Both iterations of torch's coefficients in this dtype, of which torch has bfloat16 alone."""
    monkeypatch.setattr(module, "iterated_in", lambda m: dtype)
    found = ours(m, QUINTIC, 5)
    assert found.dtype == dtype
    with monkeypatch.context() as patch:
        if dtype == torch.float32:
            patch.setattr(Tensor, "bfloat16", Tensor.float)
            patch.setattr(torch, "bfloat16", torch.float32)  # for which torch 2.15 asks by name
        theirs = TORCHS_ITERATION(m, QUINTIC, 5, 1e-7)
    assert theirs.dtype == dtype
    return found.double(), theirs.double()


def check_beside_torchs(found: Tensor, theirs: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """The singular values are in the range of torch's and the exact ones, or in that to which the coefficients map all,
    0.68 to 1.21. The error is of the size of torch's: smaller where values differ much, up to 3 times as large for
    random matrices.
    """
    slack, least = (0.1, 1e-2) if dtype == torch.bfloat16 else (1e-3, 1e-5)
    values, other, true = (torch.linalg.svdvals(x) for x in (found, theirs, expected))
    assert values.max() <= max((1 + slack) * max(other.max(), true.max()), 1.21)
    assert values.min() >= (1 - slack) * min(other.min(), true.min()) - least
    error, torchs = (found - expected).norm(), (theirs - expected).norm()
    assert error <= 4 * torchs + (0.0 if dtype == torch.bfloat16 else 1e-4) * expected.norm()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_singular_values_beside_torchs(
    dtype: torch.dtype, ratio: int, spectrum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = matrix(spectrum, ratio)
    found, theirs = ours_and_torchs(m, dtype, monkeypatch)
    check_beside_torchs(found, theirs, exact(m, [QUINTIC] * 5), dtype)


@pytest.mark.parametrize("spectrum", ["1e-6 to 1", "1e-3 to 1", "rank 4", "one of 1, the others 1e-3"])
def test_a_gram_matrix_that_is_never_computed_anew_fails(spectrum: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, of what the test above lets pass."""
    monkeypatch.setattr(module, "GROWTH_AT_FIRST", math.inf)
    m = matrix(spectrum, 4)
    found, theirs = ours_and_torchs(m, torch.bfloat16, monkeypatch)
    assert not found.isfinite().all() or torch.linalg.svdvals(found).max() > 1.5
    with pytest.raises(AssertionError):
        check_beside_torchs(found, theirs, exact(m, [QUINTIC] * 5), torch.bfloat16)


STEPS = {
    "quintic": [QUINTIC] * 5,
    "9 of the quintic": [QUINTIC] * 9,
    "polar_express": list(PRESETS["polar_express"]),
    "speedrun": SPEEDRUN,
    "convergent": [CONVERGENT] * 12,
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_bfloat16_bears_every_set_of_coefficients(name: str, spectrum: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As well as it does one by one."""
    monkeypatch.setattr(module, "iterated_in", lambda m: torch.bfloat16)
    m, coefficients = matrix(spectrum, 4), STEPS[name]
    found = torch.linalg.svdvals(ours(m, coefficients, len(coefficients)).double())
    monkeypatch.setattr(module, "LONG", math.inf)
    alone = torch.linalg.svdvals(ours(m, coefficients, len(coefficients)).double())
    true = torch.linalg.svdvals(exact(m, coefficients))
    assert found.max() <= 1.1 * max(alone.max(), true.max())
    assert found.min() >= 0.9 * min(alone.min(), true.min()) - 1e-2


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (9, 4), (3, 24), (1, 6)])
def test_steps_of_a_phase_are_steps(name: str, shape: tuple[int, int]) -> None:
    m, coefficients = torch.randn(shape, dtype=torch.float64), STEPS[name]
    for count in range(1, len(coefficients) + 1):
        expected = exact(m, coefficients[:count])
        torch.testing.assert_close(ours(m, coefficients[:count], count), expected, rtol=1e-8, atol=1e-8)


def test_phases() -> None:
    lengths = {name: [len(phase) for phase in phases(own)] for name, own in STEPS.items()}
    assert lengths["quintic"] == [3, 2]
    assert lengths["9 of the quintic"] == [3, 2, 2, 2]
    assert lengths["polar_express"] == lengths["speedrun"] == [2, 2, 1]
    for name, own in STEPS.items():
        assert [triple for phase in phases(own) for triple in phase] == own, name
    assert phases([]) == []


@pytest.mark.parametrize(
    ("coefficients", "ratio", "expected"),
    [(QUINTIC, 1, 30), (QUINTIC, 2, 44), (QUINTIC, 4, 60), (QUINTIC, 8, 92), ("polar_express", 4, 70)],
)
def test_operations(coefficients: object, ratio: int, expected: int) -> None:
    """As :func:`advance` counts them, in cubes of the number of rows."""
    with FlopCounterMode(display=False) as counter:
        ours(torch.randn(32, 32 * ratio), coefficients, 5)
    assert counter.get_total_flops() == expected * 32**3


def test_large_matrices_take_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of products by 4 panels, 5/8."""
    monkeypatch.setattr(products, "PANEL", 24)
    rows = 4 * 24
    with FlopCounterMode(display=False) as counter:
        ours(torch.randn(rows, 2 * rows), QUINTIC, 5)
    by_factor = 2 * 2 * 2  # of 44 for all: two products, of two columns a row
    assert counter.get_total_flops() == (by_factor + (44 - by_factor) * 5 / 8) * rows**3


@pytest.mark.parametrize("rows", [77, 40])
def test_batches_after_each_other_are_as_each_alone(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share buffers, which are of several sizes and layouts here."""
    monkeypatch.setattr(products, "PANEL", 24)
    monkeypatch.setattr(module, "LARGEST_ON_CPU", 4 * rows * rows)
    shapes = [(rows, 2 * rows), (2 * rows, rows), (rows, rows), (2 * rows, rows), (rows, 2 * rows), (rows, 2 * rows)]
    own = [torch.randn(shape) for shape in shapes]
    before = [m.clone() for m in own]
    scales = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    with torch.no_grad():
        together = newton_schulz(own, QUINTIC, 5, 1e-7, scales)
    assert all(torch.equal(m, b) for m, b in zip(own, before, strict=True))
    for m, x, scale in zip(own, together, scales, strict=True):
        torch.testing.assert_close(x, scale * ours(m, QUINTIC, 5), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(x.double(), scale * exact(m, [QUINTIC] * 5), rtol=1e-3, atol=1e-3)


def test_what_is_fetched_is_iterated_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_ON_CPU", 12)
    shapes, asked = [(3, 4), (2, 2), (4, 3), (3, 4)], []
    own = [torch.randn(shape) for shape in shapes]

    def fetch(places: list[int]) -> list[Tensor]:
        asked.append(places)
        return [own[i].clone() for i in places]

    with torch.no_grad():
        found = newton_schulz([torch.empty(shape) for shape in shapes], QUINTIC, 5, 1e-7, [1.0] * 4, fetch)
    assert asked == [[0], [3], [2], [1]]
    for x, m in zip(found, own, strict=True):
        torch.testing.assert_close(x, ours(m, QUINTIC, 5))


def test_autograd_records_the_iteration() -> None:
    m = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: newton_schulz([m], QUINTIC, 2, 1e-7, [2.0])[0], m)


def test_coefficients() -> None:
    assert triples(QUINTIC, 2) == [QUINTIC, QUINTIC]
    assert triples(list(QUINTIC), 1) == [QUINTIC]
    assert triples(torch.tensor(QUINTIC, dtype=torch.float64), 1) == [QUINTIC]
    assert triples([list(QUINTIC), CONVERGENT, QUINTIC], 3) == [QUINTIC, CONVERGENT, QUINTIC]
    assert triples("polar_express", 5)[4] == pytest.approx((2.1911, -1.4417, 0.3281), abs=1e-4)
    assert triples(QUINTIC, 0) == []


WRONG = [
    ({"ns_coefficients": "polar"}, "'polar' is no preset. Use 'polar_express', three numbers"),
    ({"ns_coefficients": "polar_express", "ns_steps": 6}, r"ns_steps: 6, where .* of 5 steps. Give ns_steps=5, or"),
    ({"ns_coefficients": SPEEDRUN[:4]}, "ns_steps: 5, where .* of 4 steps. Give ns_steps=4, or one triple"),
    ({"ns_coefficients": [(1.0, 2.0)] * 5}, "Give three numbers, .* or three for each step"),
    ({"ns_coefficients": [QUINTIC, 1.0, QUINTIC], "ns_steps": 3}, "Give three numbers, .* or three for each step"),
    ({"ns_coefficients": (1.0, 2.0)}, r"\(1.0, 2.0\). Give three numbers"),
    ({"ns_coefficients": ()}, r"ns_coefficients=\(\) are of 0 steps"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_is_no_coefficients(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        triton_optim.Muon([Parameter(torch.zeros(2, 2))], **options)


@pytest.mark.parametrize("coefficients", ["polar_express", SPEEDRUN, tuple(SPEEDRUN), QUINTIC], ids=str)
def test_coefficients_survive_a_checkpoint(coefficients: object) -> None:
    start = torch.randn(4, 9)

    def build(**options: object) -> tuple[Parameter, triton_optim.Muon]:
        p = Parameter(start.clone())
        return p, triton_optim.Muon([p], lr=0.1, backend="eager", **options)  # type: ignore[arg-type]

    p, optimizer = build(ns_coefficients=coefficients)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q, other = build()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["ns_coefficients"] == coefficients
    g = torch.randn_like(p)
    for parameter, own in ((p, optimizer), (q, other), (p, copy.deepcopy(optimizer))):
        parameter.grad = g.clone()
        own.step()
    assert not torch.equal(q, start)
    expected = start * (1 - 0.1 * 0.1) - 0.1 * exact(g, triples(coefficients, 5)).float()  # type: ignore[arg-type]
    torch.testing.assert_close(q.detach(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=0)


def test_a_checkpoint_of_torchs_loads() -> None:
    p, q = Parameter(torch.ones(3, 8)), Parameter(torch.ones(3, 8))
    theirs, own = torch.optim.Muon([p]), triton_optim.Muon([q], ns_coefficients="polar_express")
    p.grad = torch.randn(3, 8)
    theirs.step()
    own.load_state_dict(theirs.state_dict())
    assert own.param_groups[0]["ns_coefficients"] == QUINTIC
    p.grad, q.grad = (torch.full((3, 8), 0.1).triu() for _ in range(2))
    with torch.no_grad():
        q.copy_(p)
    theirs.step()
    own.step()
    torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5)
