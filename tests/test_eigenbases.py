"""SOAP, KL-SOAP and Shampoo: matrices in batches, which sides have a preconditioner, and bases that turn."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import needs_loops
from torch import Tensor
from torch.nn import Parameter
from walks import BASES, OFTEN, OWN, normal, walked

import triton_optim
from triton_optim.optimizers.matrix import eigenbases, newton_schulz
from triton_optim.optimizers.matrix.symmetric_product import symmetric_product

each = pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)


@each
def test_the_steps_worked_out_by_hand(case: Any) -> None:
    """Among them two eigenvectors that change places, and the moments with them."""
    for options, gradients, after in case.by_hand:
        p = Parameter(torch.ones(torch.tensor(gradients[0]).shape, dtype=torch.float64))
        optimizer = case.ours([p], **options, backend="eager")
        for g in gradients:
            p.grad = torch.tensor(g, dtype=torch.float64)
            optimizer.step()
        found = {"p": p.detach(), **optimizer.state[p]}
        for name, value in after.items():
            torch.testing.assert_close(found[name], torch.as_tensor(value, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_basis_nears_the_eigenvectors(ordered: bool) -> None:
    """Of matrices whose second eigenvalue has become the largest, and of one that is not finite, which changes none."""
    random = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(3, 4, 4, generator=random, dtype=torch.float64))[0]
    values = torch.tensor([8.0, 1.0, 0.1, 0.0], dtype=torch.float64)
    before = turn[:, :, [1, 0, 2, 3]]
    a = turn * values @ turn.mT
    a[2, 1, 1] = float("inf")
    longer, order = eigenbases.iterated(a, before, ordered)
    basis = eigenbases.orthogonal(longer)
    signs = (basis * before).sum(-2).sign() if not ordered else (basis * turn).sum(-2).sign()
    assert (order is None) is not ordered
    expected = turn if ordered else before
    torch.testing.assert_close(basis[:2] * signs[:2, None], expected[:2], rtol=0, atol=1e-12)
    if ordered:
        assert order is not None
        assert order[:2, :3].tolist() == [[1, 0, 2]] * 2
        torch.testing.assert_close(basis[2], before[2][:, order[2]], rtol=0, atol=1e-12)
    else:
        torch.testing.assert_close(basis[2], before[2], rtol=0, atol=1e-12)


def test_eigenvectors_come_in_order() -> None:
    a = torch.diag_embed(torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]]))
    first, second = eigenbases.eigenvectors(a)
    torch.testing.assert_close(first, torch.eye(3)[:, [1, 2, 0]])
    assert second[2, 0] == 1
    torch.testing.assert_close(second @ second.mT, torch.eye(3))
    bad = eigenbases.eigenvectors(torch.full((1, 2, 2), float("nan")))[0]
    torch.testing.assert_close(bad @ bad.mT, torch.eye(2))


@each
def test_what_fails_in_float32_is_decomposed_in_float64(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, ends = torch.linalg.eigh, []

    def failing(a: Tensor) -> Any:
        if a.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return real(a)

    for eigh in (real, failing):
        monkeypatch.setattr(torch.linalg, "eigh", eigh)
        p = normal(3, 3, dtype=torch.float32)
        walked(case.ours([p], **OFTEN, backend="eager"), 3)
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
    assert ends[0].dtype == torch.float32


@pytest.mark.parametrize("case", BASES, ids=lambda case: case.name)
def test_moments_are_carried_over_when_the_bases_turn(case: Any) -> None:
    """The first moment is the mean of the gradients, in whatever bases it is kept; of the second, which has no such
    meaning, SOAP's goes with the eigenvectors that it is of.
    """
    p = normal(5, 4)
    optimizer = case.ours([p], **OFTEN, betas=(0.8, 0.9), backend="eager")
    mean = torch.zeros_like(p)
    for step in range(12):
        walked(optimizer, 1, seed=step)
        assert p.grad is not None
        mean = 0.8 * mean + 0.2 * p.grad if step else mean  # the first gradient is in none
        state = optimizer.state[p]
        back = state["Q_L"] @ state["exp_avg"] @ state["Q_R"].mT
        torch.testing.assert_close(back, mean.detach(), rtol=1e-12, atol=1e-13)
        for basis in (state["Q_L"], state["Q_R"]):
            torch.testing.assert_close(basis.mT @ basis, torch.eye(len(basis), dtype=p.dtype), rtol=0, atol=1e-13)


@each
def test_the_first_step_of_soap_moves_nothing(case: Any) -> None:
    params = [normal(4, 3), normal(5)]
    before = [p.detach().clone() for p in params]
    optimizer = case.ours(params, lr=0.1, weight_decay=0.5, backend="eager")
    walked(optimizer, 1)
    moved = [not torch.equal(p.detach(), was) for p, was in zip(params, before, strict=True)]
    assert moved == [case.name == "Shampoo"] * 2


@each
def test_which_sides_have_a_preconditioner(case: Any) -> None:
    shapes = [(4, 3), (3, 9), (9, 8), (1, 4), (4, 1), (2, 2, 2), (5,), (9,), (), (0, 3)]
    sides = ["LR", "L", "", "R", "L", "LR", "", "", "", ""]
    params = [normal(*shape) for shape in shapes]
    optimizer = case.ours([{"params": params}, {"params": [normal(5), normal(9)], "precondition_1d": True}],
                          max_precond_dim=5, backend="eager")  # fmt: skip
    walked(optimizer, 3)
    every = [p for group in optimizer.param_groups for p in group["params"]]
    found = ["".join(side for side in "LR" if side in optimizer.state[p]) for p in every]
    assert found == [*sides, "L", ""]
    assert tuple(optimizer.state[params[5]]["R"].shape) == (4, 4)
    report = triton_optim.memory_report(optimizer)
    states = [state for state in optimizer.state.values() for state in state.items() if state[0] != "step"]
    assert sum(report.states.values()) == sum(value.nbytes for _, value in states)


@each
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_is_the_matrix_of_its_outputs(case: Any, channels_last: bool) -> None:
    p, q = normal(4, 2, 3, 3), normal(4, 2, 3, 3)
    q = Parameter(q.detach().reshape(4, 18))
    if channels_last:
        p = Parameter(p.detach().contiguous(memory_format=torch.channels_last))
    ends = [case.ours([x], **OFTEN, max_precond_dim=6, backend="eager") for x in (p, q)]
    for optimizer in ends:
        walked_alike(optimizer, 6)
    torch.testing.assert_close(p.reshape(4, 18), q, rtol=1e-12, atol=1e-12)


def walked_alike(optimizer: Any, steps: int) -> None:
    """Gradients that are the same numbers whatever the shape."""
    (p,) = optimizer.param_groups[0]["params"]
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        p.grad = torch.randn(p.numel(), generator=random, dtype=p.dtype).view(p.shape)
        optimizer.step()


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """The name and shape of each."""
    seen: list[tuple[str, tuple[int, ...]]] = []

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, *rest: Any) -> Any:
            seen.append((name, tuple(x.shape)))
            return real(x, *rest)

        return call

    for name in ("eigh", "qr"):
        monkeypatch.setattr(torch.linalg, name, counting(name, getattr(torch.linalg, name)))
    return seen


@each
def test_matrices_of_one_shape_are_one_batch(
    case: Any, decompositions: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In portions where they would take much memory, which changes no result."""
    ends, shapes = [], [(4, 3), (6, 2), (4, 3), (4, 3), (7,), (4, 3), (7,)]
    counts = {}
    for largest in (1 << 19, 32):  # two matrices of 4 x 4
        monkeypatch.setattr(eigenbases, "LARGEST_ON_CPU", largest)
        params = [normal(*shape) for shape in shapes]
        optimizer = case.ours(params, **OFTEN, backend="eager")
        decompositions.clear()
        walked(optimizer, 3)
        counts[largest] = sorted(shape for _, shape in decompositions)
        walked(optimizer, 3, seed=1)
        ends.append([p.detach() for p in params])
    times = 1 if case.name == "Shampoo" else 2  # the first, and after two updates; roots after two steps
    assert counts[1 << 19] == sorted([(4, 4, 4), (4, 3, 3), (1, 6, 6), (1, 2, 2)] * times)
    assert counts[32] == sorted([(2, 4, 4), (2, 3, 3)] * 2 * times + [(1, 6, 6), (1, 2, 2)] * times)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@each
def test_most_steps_decompose_nothing(case: Any, decompositions: list[Any]) -> None:
    optimizer = case.ours([normal(4, 3)], precondition_frequency=5, backend="eager")
    counts = []
    for step in range(12):
        decompositions.clear()
        walked(optimizer, 1, seed=step)
        counts.append(len(decompositions))
    own = {"Shampoo": (4, 9)}.get(case.name, (0, 5, 10))
    assert counts == [2 * (step in own) for step in range(12)]


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": torch.zeros_like,
    "of one direction": lambda x: x[:, :1] @ x[:1],
    "ill-conditioned": lambda x: x * 10.0 ** -torch.arange(x.shape[1]).mul(3).to(x.dtype),
    "tiny": lambda x: x * 1e-30,
    "huge": lambda x: x * 1e30,
    "subnormal": lambda x: x * 1e-40,
}


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(GRADIENTS))
def test_gradients_of_any_kind_leave_all_finite(case: Any, kind: str, dtype: torch.dtype) -> None:
    options = {"lr": 0.01, "precondition_frequency": 1}
    params = [Parameter(torch.ones(6, 5, dtype=dtype)), Parameter(torch.ones(3, 2, dtype=dtype))]
    optimizer = case.ours(params, **options, backend="eager")
    random = torch.Generator().manual_seed(0)
    for step in range(9):
        for p in params:
            g = torch.randn(p.shape, generator=random)
            p.grad = (GRADIENTS[kind](g) if step < 6 else g).to(dtype)
        optimizer.step()
    for p in params:
        assert p.isfinite().all()
        assert (p - 1).abs().max() < 1  # such a gradient is forgotten


@each
def test_a_gradient_that_is_no_number_is_no_error(case: Any) -> None:
    """As with Adam its parameter is none then, either; a parameter of the same batch is as it was alone."""
    params, (alone,) = [normal(3, 3), normal(3, 3)], [normal(3, 3)]
    optimizers = [case.ours(own, **OFTEN, backend="eager") for own in (params, [alone])]
    for step in range(6):
        random = torch.Generator().manual_seed(step)
        g = torch.randn(3, 3, generator=random, dtype=torch.float64)
        params[0].grad, alone.grad, params[1].grad = g, g.clone(), torch.full_like(g, float("nan"))
        for optimizer in optimizers:
            optimizer.step()
    assert params[1].isnan().all()
    torch.testing.assert_close(params[0], alone, rtol=1e-10, atol=1e-12)


@each
@pytest.mark.parametrize("after", [1, 3, 4])
def test_resumed_it_goes_on_to_the_bit(case: Any, after: int) -> None:
    """At steps with and without new bases, through a file."""
    ends = []
    for stops in (False, True):
        params = [normal(4, 3, dtype=torch.float32), normal(4, 3, dtype=torch.float32), normal(5, dtype=torch.float32)]
        optimizer = case.ours(params, **OFTEN, backend="eager")
        walked(optimizer, after)
        if stops:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            params = [Parameter(p.detach().clone()) for p in params]
            optimizer = case.ours(params, **OFTEN, backend="eager")
            optimizer.load_state_dict(torch.load(file))
        walked(optimizer, 5, seed=1)
        ends.append([p.detach() for p in params] + [v for s in optimizer.state.values() for v in s.values()])
    assert len(ends[0]) == len(ends[1])
    assert all(map(torch.equal, *ends))


@each
def test_half_precision_keeps_wide_states(case: Any) -> None:
    p = normal(4, 3, dtype=torch.bfloat16)
    optimizer = case.ours([p], **OFTEN, backend="eager")
    walked(optimizer, 3)
    again = copy.deepcopy(optimizer)
    assert {v.dtype for s in (optimizer, again) for v in next(iter(s.state.values())).values()} == {torch.float32}


@needs_loops
@each
def test_products_by_the_kernel_of_a_gpu(case: Any, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    ends = []
    for by_kernel in (False, True):
        if by_kernel:
            kernels = functools.partial(symmetric_product, backend="triton")
            monkeypatch.setattr(newton_schulz, "symmetric_product", kernels)
            monkeypatch.setattr(newton_schulz, "GPUS", (device.type,))
        p = Parameter(normal(5, 4, dtype=torch.float32).detach().to(device))
        optimizer = case.ours([p], **OFTEN, backend="eager")
        walked(optimizer, 4)
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=5e-5, atol=1e-5)


@each
def test_a_step_is_not_captured(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = normal(4, 3)
    before = p.detach().clone()
    optimizer = case.ours([p], capturable=True, backend="eager")
    monkeypatch.setattr(eigenbases, "capturing", lambda _: True)
    with pytest.raises(RuntimeError, match="can't be captured"):
        walked(optimizer, 1)
    assert torch.equal(p, before)
    assert not optimizer.state[p]["exp_avg"].any()
    assert optimizer.state[p]["step"] == 0


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=needs_loops)])
@each
def test_a_skipped_step_is_none(case: Any, backend: str) -> None:
    """A gradient scaler's: the first step that counts is the first that was not skipped."""
    ends = []
    for skips in (False, True):
        p = normal(4, 3, dtype=torch.float32)
        optimizer = case.ours([p], **OFTEN, amp="fused", backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**6)
        for step in range(7):
            if skips and step in (0, 3):
                p.grad = torch.full_like(p, float("inf"))
                scaler.scale(torch.ones(()))
                scaler.step(optimizer)
                scaler.update()
            random = torch.Generator().manual_seed(step)
            p.grad = torch.randn(p.shape, generator=random) * scaler.get_scale()
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


@each
def test_autograd_records_the_step(case: Any) -> None:
    def stepped(p: Tensor, *gradients: Tensor) -> Tensor:
        p = p.clone()
        optimizer = case.ours([p], lr=0.1, precondition_frequency=1, eps=1e-2, differentiable=True)
        for g in gradients:
            p.grad = g.clone()
            optimizer.step()
        return p

    random = torch.Generator().manual_seed(1)
    given = [torch.randn(2, 2, generator=random, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(stepped, given, fast_mode=True)


WRONG: list[tuple[str, dict[str, Any]]] = [
    *((case.name, {"lr": -1.0}) for case in OWN),
    *((case.name, {"betas": (1.0, 0.9)}) for case in OWN),
    *((case.name, {"betas": (0.9, -0.5)}) for case in OWN),
    *((case.name, {"eps": -1.0}) for case in OWN),
    *((case.name, {"weight_decay": -1.0}) for case in OWN),
    *((case.name, {"precondition_frequency": 0}) for case in OWN),
    *((case.name, {"precondition_frequency": 2.5}) for case in OWN),
    *((case.name, {"max_precond_dim": -1}) for case in OWN),
    ("SOAP", {"shampoo_beta": 1.0}),
    ("KLSOAP", {"shampoo_beta": -0.5}),
    ("KLSOAP", {"init_factor": 0.0}),
    ("Shampoo", {"grafting": "lion"}),
    ("Shampoo", {"grafting_eps": -1.0}),
    ("Shampoo", {"start_preconditioning_step": 0}),
    ("Shampoo", {"block_size": 1}),
    ("Shampoo", {"block_size": 2.5}),
]


@pytest.mark.parametrize(("name", "options"), WRONG, ids=str)
def test_out_of_range(name: str, options: dict[str, Any]) -> None:
    ((option, _),) = options.items()
    said = {"lr": "learning rate", "betas": "beta parameter", "eps": "epsilon"}.get(option, option)
    with pytest.raises(ValueError, match=f"Invalid {said}") as error:
        getattr(triton_optim, name)([normal(2, 2)], **options)
    assert any(word in str(error.value) for word in ("must be", "Use "))


@each
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "int8"])
def test_its_states_have_no_codes(case: Any, state_dtype: Any) -> None:
    with pytest.raises(RuntimeError, match=r"exp_avg.*Leave state_dtype out"):
        case.ours([normal(2, 2, dtype=torch.float32)], state_dtype=state_dtype)
