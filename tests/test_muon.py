"""Muon: the iteration over many matrices, AdamW's groups, and which parameters go where."""

import copy
import functools

import pytest
import torch
from conftest import OUR_ITERATED_IN, TORCHS_ITERATION, needs_loops
from one_step import step_with
from references_matrix import newton_schulz as reference
from table import REFERENCES
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.optimizers.matrix import newton_schulz as module
from triton_optim.optimizers.matrix.newton_schulz import newton_schulz
from triton_optim.optimizers.matrix.symmetric_product import symmetric_product

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(6, 4), (4, 6), (5, 5), (4, 6), (1, 7), (9, 1), (6, 4)]


def matrices(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in SHAPES]


def test_iteration_is_the_papers() -> None:
    own = matrices(torch.float64)
    scales = [1.0, 2.0, 0.5, 1.0, 1.0, 3.0, 1.0]
    with torch.no_grad():
        ends = newton_schulz(own, COEFFICIENTS, 5, 1e-7, scales)
    for x, m, scale in zip(ends, own, scales, strict=True):
        expected = scale * torch.from_numpy(reference(m.numpy(), COEFFICIENTS, 5, 1e-7))
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batched_is_per_matrix_to_1e_5(dtype: torch.dtype) -> None:
    own = [torch.randn(shape, dtype=dtype) for shape in [(96, 160), (160, 96), (96, 160), (64, 64)] * 2]
    with torch.no_grad():
        together = newton_schulz(own, COEFFICIENTS, 5, 1e-7, [1.0] * len(own))
        each = [newton_schulz([m], COEFFICIENTS, 5, 1e-7, [1.0])[0] for m in own]
    for x, alone in zip(together, each, strict=True):
        torch.testing.assert_close(x, alone, rtol=1e-5, atol=1e-5)


def test_a_shape_and_its_transpose_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[tuple[int, ...]] = []

    def iterate(x: Tensor, *rest: object) -> Tensor:
        batches.append(tuple(x.shape))
        return x

    monkeypatch.setattr(module, "iterate", iterate)
    newton_schulz(matrices(torch.float32), COEFFICIENTS, 5, 1e-7, [1.0] * len(SHAPES))
    assert sorted(batches) == [(1, 1, 7), (1, 1, 9), (1, 5, 5), (4, 4, 6)]
    for name in ("LARGEST_ON_CPU", "LARGEST_OF_16_BITS"):
        monkeypatch.setattr(module, name, 50)  # two matrices of 24
    batches.clear()
    newton_schulz(matrices(torch.float32), COEFFICIENTS, 5, 1e-7, [1.0] * len(SHAPES))
    assert batches.count((2, 4, 6)) == 2


@pytest.mark.parametrize(
    ("threads", "elements", "expected"), [(2, 768 * 3072, 4), (3, 768 * 3072, 3), (16, 768**2, 16)]
)
def test_threads_take_a_matrix_of_16_bits_each(
    threads: int, elements: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert module.batch_size(torch.device("cpu"), torch.bfloat16, elements) == expected
    assert module.batch_size(torch.device("cpu"), torch.float32, elements) == 1
    assert module.batch_size(torch.device("cpu"), torch.bfloat16, 4096**2) == 1


@needs_loops
def test_iteration_by_the_kernel_of_symmetric_products(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """As on a GPU; here the interpreter runs the kernel, on float32."""
    kernels = functools.partial(symmetric_product, backend="triton")
    monkeypatch.setattr(module, "symmetric_product", kernels)
    monkeypatch.setattr(module, "GPUS", (device.type,))
    own = [m.to(device) for m in [*matrices(torch.float32), torch.randn(6, 20), torch.randn(20, 6)]]
    with torch.no_grad():
        ends = newton_schulz(own, COEFFICIENTS, 5, 1e-7, [1.0] * len(own))
    for x, m in zip(ends, own, strict=True):
        expected = torch.from_numpy(reference(m.double().cpu().numpy(), COEFFICIENTS, 5, 1e-7))
        torch.testing.assert_close(x.double().cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_matrices_without_elements(shape: tuple[int, int]) -> None:
    (x,) = newton_schulz([torch.zeros(shape)], COEFFICIENTS, 5, 1e-7, [1.0])
    assert x.shape == shape


def test_a_zero_matrix_stays_zero() -> None:
    (x,) = newton_schulz([torch.zeros(3, 4)], COEFFICIENTS, 5, 1e-7, [1.0])
    assert torch.equal(x, torch.zeros(3, 4))


def test_singular_values_come_near_one() -> None:
    (x,) = newton_schulz([torch.randn(20, 30, dtype=torch.float64)], COEFFICIENTS, 5, 1e-7, [1.0])
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.5
    assert values.max() < 1.5


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_the_references(adjust: str | None, nesterov: bool) -> None:
    options = {"lr": 0.02, "adjust_lr_fn": adjust, "nesterov": nesterov, "ns_steps": 4, "momentum": 0.9}
    params = [Parameter(m) for m in matrices(torch.float64)]
    start = [p.detach().clone().numpy() for p in params]
    gradients = [[torch.randn_like(p) for p in params] for _ in range(4)]
    optimizer = triton_optim.Muon(params, backend="eager", **options)
    for own in gradients:
        step_with(optimizer, params, own)
    ends, states = REFERENCES["Muon"](start, [[g.numpy() for g in own] for own in gradients], **options)
    for p, expected, state in zip(params, ends, states, strict=True):
        torch.testing.assert_close(p.detach(), torch.from_numpy(expected), rtol=1e-9, atol=1e-12)
        buffer = optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(buffer, torch.from_numpy(state["momentum_buffer"]), rtol=1e-12, atol=1e-12)


def test_torchs_to_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch iterates in bfloat16: an update has an error of some 2^-8 of its norm there."""
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", TORCHS_ITERATION)
    monkeypatch.setattr(module, "iterated_in", OUR_ITERATED_IN)
    start = [torch.randn(32, 48), torch.randn(48, 32)]
    ends = []
    for cls in (triton_optim.Muon, torch.optim.Muon):
        torch.manual_seed(1)
        params = [Parameter(m.clone()) for m in start]
        optimizer = cls(params, lr=0.1, weight_decay=0.0)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        ends.append([p.detach() - m for p, m in zip(params, start, strict=True)])
    for ours, theirs in zip(*ends, strict=True):
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()


def test_groups_of_adamw_are_adamws(backend: str) -> None:
    start = [torch.randn(4, 6), torch.randn(6), torch.randn(10, 4)]
    runs = []
    for mixed in (True, False):
        torch.manual_seed(1)
        matrix, *rest = [Parameter(x.clone()) for x in start]
        if mixed:
            group = {"params": rest, "use_muon": False, "lr": 0.01, "weight_decay": 0.1}
            optimizers = [triton_optim.Muon([{"params": [matrix]}, group], lr=0.02, backend=backend)]
        else:
            optimizers = [
                triton_optim.Muon([matrix], lr=0.02, backend=backend),
                triton_optim.AdamW(rest, lr=0.01, weight_decay=0.1, backend=backend),
            ]
        for _ in range(4):
            for p in (matrix, *rest):
                p.grad = torch.randn_like(p)
            for optimizer in optimizers:
                optimizer.step()
        runs.append([matrix, *rest])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_groups_of_adamw_have_adamws_defaults() -> None:
    params = [Parameter(torch.randn(3))]
    group = triton_optim.Muon([{"params": params, "use_muon": False}], lr=0.02).param_groups[0]
    theirs = torch.optim.AdamW(params).param_groups[0]
    for name in ("lr", "betas", "eps", "weight_decay"):
        assert group[name] == theirs[name]


def test_checkpoints_with_groups_of_adamw() -> None:
    def build() -> tuple[list[Parameter], triton_optim.Muon]:
        torch.manual_seed(0)
        params = [Parameter(torch.randn(4, 6)), Parameter(torch.randn(6))]
        groups = [{"params": params[:1]}, {"params": params[1:], "use_muon": False}]
        return params, triton_optim.Muon(groups, backend="eager")

    def train(params: list[Parameter], optimizer: triton_optim.Muon, seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()

    params, optimizer = build()
    train(params, optimizer, 1)
    other, resumed = build()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(other, params, strict=True):
            p.copy_(q)
    for pair in ((params, optimizer), (other, resumed)):
        train(*pair, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(params, other, strict=True))


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.norm = torch.nn.LayerNorm(4)
        self.lm_head = torch.nn.Linear(4, 10, bias=False)
        self.out = torch.nn.Linear(4, 3)
        self.lm_head.weight = self.embedding.weight


def test_which_parameters_muon_gets() -> None:
    model = Tied()
    model.blocks[1].weight.requires_grad_(False)
    hidden, rest = triton_optim.muon_param_groups(model, heads=["out"], adamw={"lr": 3e-4})
    assert [id(p) for p in hidden["params"]] == [id(model.blocks[0].weight)]
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in rest["params"]] == [
        "embedding.weight",
        "blocks.0.bias",
        "blocks.1.bias",
        "norm.weight",
        "norm.bias",
        "out.weight",
        "out.bias",
    ]
    assert (rest["use_muon"], rest["lr"]) == (False, 3e-4)
    triton_optim.Muon([hidden, rest], lr=0.02)


def test_a_string_of_heads_is_one_name() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    for heads in ("2", ["2"]):
        assert [len(group["params"]) for group in triton_optim.muon_param_groups(model, heads=heads)] == [2, 4]
    model = torch.nn.ModuleDict({"out": torch.nn.Linear(8, 8), "o": torch.nn.Linear(8, 8)})
    hidden, _ = triton_optim.muon_param_groups(model, heads="out")  # not o, u and t
    assert hidden["params"] == [model["o"].weight]


@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_an_empty_matrix_is_stepped(shape: tuple[int, int], adjust_lr_fn: str | None) -> None:
    """Of one without columns torch divides by their number."""
    p, q = Parameter(torch.zeros(shape)), Parameter(torch.ones(2, 2))
    optimizer = triton_optim.Muon([p, q], adjust_lr_fn=adjust_lr_fn)
    for _ in range(2):
        p.grad, q.grad = torch.zeros_like(p), torch.ones_like(q)
        optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].shape == shape
    assert (q < 1).all()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_near_the_largest_number_moves_as_torchs(
    dtype: torch.dtype, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", TORCHS_ITERATION)
    largest = 65504.0 if dtype == torch.float16 else 2.0**127
    found = []
    for cls in (torch.optim.Muon, triton_optim.Muon):
        random = torch.Generator().manual_seed(0)
        p = Parameter(torch.randn(5, 4, generator=random).to(dtype))
        optimizer = cls([p], lr=0.1, nesterov=nesterov)
        for _ in range(3):
            p.grad = (torch.randn(5, 4, generator=random).sign() * largest).to(dtype)
            optimizer.step()
        found.append(p.detach())
    assert found[1].isfinite().all()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0.02)  # torch's are iterated in bfloat16


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_a_gradient_of_nothing_moves_nothing_where_eps_is_0(size: float) -> None:
    """torch divides 0 by 0, as the squares of very small numbers are, too."""
    p = Parameter(torch.ones(3, 2))
    optimizer = triton_optim.Muon([p], lr=0.1, eps=0, weight_decay=0)
    p.grad = torch.full_like(p, size)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.ones(3, 2), rtol=0, atol=1e-6)


def test_a_model_without_hidden_matrices_is_all_adamws() -> None:
    (group,) = triton_optim.muon_param_groups(torch.nn.LayerNorm(3))
    assert group["use_muon"] is False


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_other_than_two_dimensions_change_nothing(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2D"):
        triton_optim.Muon([Parameter(torch.zeros(shape))])
    optimizer = triton_optim.Muon([Parameter(torch.zeros(2, 2))])
    with pytest.raises(ValueError, match="use_muon"):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(shape))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("options", [{"ns_steps": 100}, {"ns_coefficients": (1.0, 2.0)}, {"momentum": -1.0}])
def test_out_of_range(options: dict) -> None:
    with pytest.raises(ValueError, match="Invalid"):
        triton_optim.Muon([Parameter(torch.zeros(2, 2))], **options)
