"""alpha x x^T + beta c against float64, symmetric to the bit, for every shape, layout and backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import HAS_GPU, needs_loops
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triton_optim import dispatch
from triton_optim.optimizers.matrix import symmetric_product as module
from triton_optim.optimizers.matrix.symmetric_product import symmetric_product

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}

BACKENDS = ["eager", pytest.param("triton", marks=needs_loops)]
in_backends = pytest.mark.parametrize("how", BACKENDS)
in_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)


def matrices(batch: int, m: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(batch, m, k).to(device, dtype)


def symmetric(batch: int, m: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    c = torch.randn(batch, m, m)
    return (c + c.mT).to(device, dtype)


def check(
    out: torch.Tensor, x: torch.Tensor, alpha: float = 1.0, beta: float = 0.0, c: Any = None, y: Any = None
) -> None:
    """Within the rounding of a float32 sum and of what is stored; the same on both sides of the diagonal."""
    wide, other = x.double(), (x if y is None else y).double().mT
    product, bound = wide @ other, wide.abs() @ other.abs()
    product = product.tril() + product.tril(-1).mT  # of polynomials that were rounded it is almost symmetric
    added = 0.0 if c is None else beta * c.double()
    expected = alpha * product + added
    sums = (x.shape[2] + 4) * torch.finfo(torch.float32).eps * (abs(alpha) * bound + abs(torch.as_tensor(added)))
    stored = torch.finfo(x.dtype).eps / 2 * expected.abs() + torch.finfo(x.dtype).tiny
    assert out.dtype == x.dtype
    assert out.device == x.device
    assert torch.equal(out, out.mT)
    assert ((out.double() - expected).abs() <= 1.01 * stored + sums).all()


@in_backends
@in_dtypes
@pytest.mark.parametrize(("m", "k"), [(1, 1), (1, 200), (7, 3), (64, 64), (65, 129), (128, 32), (144, 80), (200, 1)])
def test_it_is_the_product(how: str, dtype: torch.dtype, m: int, k: int, device: torch.device) -> None:
    x, c = matrices(2, m, k, dtype, device), symmetric(2, m, dtype, device)
    check(symmetric_product(x, backend=how), x)
    check(symmetric_product(x, -0.5, 2.0, c, backend=how), x, -0.5, 2.0, c)


@in_backends
def test_a_newton_schulz_step(how: str, device: torch.device) -> None:
    """Muon's two symmetric products, the second of the symmetric first."""
    x = matrices(3, 40, 70, torch.float32, device) / 20
    gram = symmetric_product(x, backend=how)
    check(symmetric_product(gram, 2.0315, -4.7750, gram, backend=how), gram, 2.0315, -4.7750, gram)


def polynomials(m: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two of one symmetric matrix, which commute."""
    gram = symmetric(2, m, torch.float64, device) / m**0.5
    return (gram @ gram - gram).to(dtype), (gram @ gram @ gram + 2 * gram).to(dtype)


@in_backends
@in_dtypes
@pytest.mark.parametrize("m", [1, 7, 64, 129])
def test_the_product_of_two_that_commute(how: str, dtype: torch.dtype, m: int, device: torch.device) -> None:
    x, y = polynomials(m, dtype, device)
    c = symmetric(2, m, dtype, device)
    check(symmetric_product(x, y=y, backend=how), x, y=y)
    check(symmetric_product(x, -0.5, 2.0, c, y=y, backend=how), x, -0.5, 2.0, c, y)


@in_backends
@pytest.mark.parametrize("layout", ["transposed", "batch innermost", "gappy", "rows of a wider matrix", "misaligned"])
def test_layouts_of_the_second(how: str, layout: str, device: torch.device) -> None:
    x, y = polynomials(70, torch.float32, device)
    for a, b in ((x, LAYOUTS[layout](y)), (LAYOUTS[layout](x), y)):
        check(symmetric_product(a, y=b, backend=how), x, y=y)


@pytest.mark.parametrize("m", [24, 47, 48, 49, 100])
def test_panels_of_rows(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU large matrices are multiplied so."""
    monkeypatch.setattr(module, "PANEL", 24)
    x, y = polynomials(m, torch.float32, torch.device("cpu"))
    c, wide = symmetric(2, m, torch.float32, x.device), matrices(3, m, 10, torch.bfloat16, x.device)
    check(symmetric_product(x, 3.0, 0.5, c, torch.full_like(c, torch.nan), y=y), x, 3.0, 0.5, c, y)
    check(symmetric_product(wide), wide)
    spoilt = c + torch.full_like(c, 99.0).triu(1)
    check(symmetric_product(x, 1.0, 0.5, spoilt), x, 1.0, 0.5, c)
    sides = module.by_panels(x, y, 3.0, 0.5, c)
    torch.testing.assert_close(sides, sides.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sides, symmetric_product(x, 3.0, 0.5, c, y=y))


def test_float64_runs_eagerly(device: torch.device) -> None:
    x = matrices(2, 33, 65, torch.float64, device)
    out = symmetric_product(x, 0.5)
    torch.testing.assert_close(out, 0.5 * x @ x.mT, rtol=1e-14, atol=1e-14)
    assert torch.equal(out, out.mT)


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "batch innermost": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "gappy": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0],
    "rows of a wider matrix": lambda t: torch.cat([t, torch.full_like(t, torch.nan)], dim=2)[..., : t.shape[2]],
    "misaligned": lambda t: torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
    "lazily negated": lambda t: torch._neg_view(-t),
    "requires grad": lambda t: t.clone().requires_grad_() * 1,
}


@in_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("m", "k"), [(144, 48), (37, 90)])
def test_layouts(how: str, layout: str, m: int, k: int, device: torch.device) -> None:
    x = LAYOUTS[layout](matrices(2, m, k, torch.bfloat16, device))
    c = LAYOUTS[layout](symmetric(2, m, torch.bfloat16, device))
    x_before, c_before = x.detach().clone(), c.detach().clone()
    out = symmetric_product(x, 0.5, -1.5, c, backend=how)
    check(out, x, 0.5, -1.5, c)
    assert not out.requires_grad
    assert torch.equal(x, x_before)
    assert torch.equal(c, c_before)


@in_backends
@pytest.mark.parametrize("layout", ["transposed", "batch innermost", "gappy", "rows of a wider matrix", "misaligned"])
def test_out_may_lie_anyhow(how: str, layout: str, device: torch.device) -> None:
    x = matrices(2, 70, 20, torch.float32, device)
    out = LAYOUTS[layout](torch.full((2, 70, 70), torch.nan, device=device))
    base = out._base
    outside = None if base is None else base.isnan().sum() - out.numel()
    assert symmetric_product(x, out=out, backend=how) is out
    check(out, x)
    assert base is None or base.isnan().sum() == outside


@in_backends
@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (0, 0, 0), (2, 0, 0)])
def test_nothing_to_compute(how: str, shape: tuple[int, ...], device: torch.device) -> None:
    out = symmetric_product(torch.empty(shape, device=device), backend=how)
    assert out.shape == (shape[0], shape[1], shape[1])


@in_backends
def test_an_empty_sum_is_zero(how: str, device: torch.device) -> None:
    x, c = torch.empty(2, 5, 0, device=device), symmetric(2, 5, torch.float32, device)
    out = torch.full((2, 5, 5), torch.nan, device=device)
    assert torch.equal(symmetric_product(x, out=out, backend=how), torch.zeros_like(out))
    assert torch.equal(symmetric_product(x, 1.0, 2.0, c, backend=how), 2 * c)


@in_backends
@in_dtypes
def test_nan_and_inf_go_through(how: str, dtype: torch.dtype, device: torch.device) -> None:
    x, c = torch.ones(1, 70, 20, dtype=dtype, device=device), torch.zeros(1, 70, 70, dtype=dtype, device=device)
    x[0, 3, 5], x[0, 66, 1] = torch.nan, torch.inf
    c[0, 10, 20] = c[0, 20, 10] = -torch.inf
    out = symmetric_product(x, 1.0, 1.0, c, backend=how)
    expected = torch.full((70, 70), 20.0)
    expected[66], expected[:, 66], expected[10, 20], expected[20, 10] = torch.inf, torch.inf, -torch.inf, -torch.inf
    expected[3], expected[:, 3] = torch.nan, torch.nan
    torch.testing.assert_close(out[0].cpu().float(), expected, rtol=0, atol=0, equal_nan=True)


@in_backends
def test_c_is_not_read_where_beta_is_0(how: str, device: torch.device) -> None:
    x = matrices(1, 20, 20, torch.float32, device)
    check(symmetric_product(x, 1.0, 0.0, torch.full((1, 20, 20), torch.nan, device=device), backend=how), x)


@in_backends
@pytest.mark.parametrize("m", [40, 150])
def test_only_the_lower_triangle_of_c_counts(how: str, m: int, device: torch.device) -> None:
    x, c = matrices(2, m, 20, torch.float32, device), symmetric(2, m, torch.float32, device)
    spoilt = c + torch.full_like(c, 99.0).triu(1)
    check(symmetric_product(x, 1.0, 0.5, spoilt, backend=how), x, 1.0, 0.5, c)


@in_backends
def test_16_bit_sums_are_in_float32(how: str, device: torch.device) -> None:
    """A bfloat16 sum of ones stops at 256, and these float16 squares overflow before alpha brings them back."""
    ones = torch.ones(1, 16, 1000, dtype=torch.bfloat16, device=device)
    assert (symmetric_product(ones, backend=how) == 1000).all()
    large = torch.full((1, 16, 64), 64.0, dtype=torch.float16, device=device)
    if how == "triton":  # BLAS may scale after it has rounded
        assert (symmetric_product(large, 2.0**-8, backend=how) == 1024).all()


@needs_loops
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(0, 3),
    m=st.integers(0, 200),
    k=st.integers(0, 150),
    transposed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    alpha=st.sampled_from([1.0, -0.25, 3.0]),
    beta=st.sampled_from([0.0, 1.0, -0.5]),
)
def test_any_shape(device, batch, m, k, transposed, dtype, alpha, beta) -> None:  # type: ignore[no-untyped-def]
    x, c = matrices(batch, m, k, dtype, device), symmetric(batch, m, dtype, device)
    x = x.mT.contiguous().mT if transposed else x
    out = torch.full_like(c, torch.nan)
    symmetric_product(x, alpha, beta, c, out, backend="triton")
    check(out, x, alpha, beta, c)


@needs_loops
@pytest.mark.parametrize("tiles", [*range(1, 40), 255, 256])
def test_programs_and_tiles_of_a_triangle_match_one_to_one(tiles: int) -> None:
    from triton_optim.kernels import symmetric_product as kernel

    function, count = kernel.tile_of.fn, kernel.programs(1, 64 * tiles, 64)
    found = {function(program, tiles) for program in range(count)}
    assert count == tiles * (tiles + 1) // 2 == len(found)
    assert all(0 <= column <= row < tiles for row, column in found)


@needs_loops
def test_a_triangle_of_the_most_tiles_is_exact() -> None:
    """Where a float32 root would err, and 32 bits nearly end."""
    from triton_optim.kernels import symmetric_product as kernel

    for tiles in (65534, 65535):
        for row in (0, 1, 4097, tiles // 2 - 1, tiles // 2, tiles - 2, tiles - 1):
            for column in (0, row // 2, row):
                pair = min(row, tiles - 1 - row)
                program = pair * (tiles + 1) + column + (0 if row == pair else pair + 1)
                assert program < tiles * (tiles + 1) // 2
                assert kernel.tile_of.fn(program, tiles) == (row, column)


@needs_loops
@pytest.mark.parametrize("dimension", range(3))
def test_offsets_beyond_2_31_elements(dimension: int, device: torch.device) -> None:
    """A stride of 2^30 four times over, of memory that is lazily there. A wrapped offset would read before it."""
    if HAS_GPU and torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    strides = [[2**30, 4, 1], [16, 2**30, 1], [16, 1, 2**30]][dimension]
    shape = [4, 4, 4]
    memory = torch.empty(3 * 2**30 + 64, dtype=torch.float16, device=device)
    values = matrices(4, 4, 4, torch.float16, device)
    x = memory.as_strided(shape, strides).copy_(values)
    check(symmetric_product(x, backend="triton"), values)
    out = memory.as_strided(shape, strides)
    symmetric_product(values, out=out, backend="triton")
    check(out, values)


def test_the_backend_is_chosen(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    launched: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "launch", lambda programs, arguments, options: launched.append(options))
    x = matrices(1, 4, 4, torch.float32, device)
    symmetric_product(x)
    assert len(launched) == HAS_GPU  # the interpreter only runs when asked for
    symmetric_product(x, backend="eager")
    assert len(launched) == HAS_GPU


def test_tf32_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", None)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert module.float32_precision(cuda) == "ieee"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert module.float32_precision(cuda) == "tf32"
        assert module.float32_precision(torch.device("cpu")) == "ieee"
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert module.float32_precision(cuda) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def errors() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    x, square = torch.zeros(2, 3, 4), torch.zeros(2, 3, 3)
    memory = torch.zeros(2, 6, 6)
    return {
        "matrix": ({"x": x[0]}, ValueError, r"x has shape \(3, 4\)\. For a single matrix pass x\.unsqueeze\(0\)"),
        "integers": ({"x": x.long()}, TypeError, r"no product of torch\.int64\. Convert x"),
        "complex": ({"x": x.cfloat()}, TypeError, r"no product of torch\.complex64\. Convert x"),
        "beta alone": ({"x": x, "beta": 0.5}, ValueError, r"beta=0\.5\) has no c .*Pass c"),
        "shape of c": ({"x": x, "c": x, "beta": 1.0}, ValueError, r"c has shape \(2, 3, 4\) .*Make it \(2, 3, 3\)"),
        "shape of out": ({"x": x, "out": square[0]}, ValueError, r"out has shape \(3, 3\) .*Make it \(2, 3, 3\)"),
        "shape of y": ({"x": x, "y": square}, ValueError, r"y has shape \(2, 3, 3\) .*Make it \(2, 3, 4\)"),
        "dtype of y": ({"x": x, "y": x.half()}, TypeError, r"y is torch\.float16 and x torch\.float32"),
        "out is y": ({"x": square + 1, "y": square, "out": square}, ValueError, "out shares memory with y"),
        "dtype of c": (
            {"x": x, "c": square.half(), "beta": 1.0},
            TypeError,
            r"c is torch\.float16 and x torch\.float32",
        ),
        "dtype of out": ({"x": x, "out": square.half()}, TypeError, r"out is torch\.float16 and x torch\.float32"),
        "device of out": ({"x": x, "out": square.to("meta")}, ValueError, "out is on meta and x on cpu. Move them"),
        "out is x": ({"x": square, "out": square}, ValueError, "out shares memory with x, which is still read"),
        "out is c": ({"x": x, "c": square, "beta": 1.0, "out": square}, ValueError, "out shares memory with c"),
        "out in x": ({"x": memory, "out": memory.view(-1)[:72].view(2, 6, 6)}, ValueError, "out shares memory with x"),
        "out on itself": ({"x": x, "out": square[:1].expand(2, 3, 3)}, ValueError, r"strides \(0, 3, 1\)"),
        "backend": ({"x": x, "backend": "cuda"}, ValueError, 'backend=\'cuda\'.*Use "triton" or "eager"'),
        "float64": ({"x": x.double(), "backend": "triton"}, RuntimeError, r"torch\.float64 .*Leave backend out"),
    }


@pytest.mark.parametrize("case", errors())
def test_errors(case: str) -> None:
    arguments, kind, message = errors()[case]
    before = {name: t.clone() for name, t in arguments.items() if isinstance(t, torch.Tensor) and not t.is_meta}
    with pytest.raises(kind, match=message):
        symmetric_product(**arguments)
    assert all(torch.equal(arguments[name], t) for name, t in before.items())


def test_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, 2, 3)
    monkeypatch.setattr(dispatch, "this_machine", lambda: dispatch.Machine(False, False, False, False))
    with pytest.raises(RuntimeError, match=r"on cpu: Triton is not installed\. Leave backend out"):
        symmetric_product(x, backend="triton")
    assert (symmetric_product(x) == 3).all()
    monkeypatch.setattr(dispatch, "this_machine", lambda: dispatch.Machine(True, False, False, False))
    with pytest.raises(RuntimeError, match=r"it needs GPU tensors; these are on cpu\. Leave backend out"):
        symmetric_product(x, backend="triton")


def test_neighbours_in_one_buffer_do_not_overlap(device: torch.device) -> None:
    """A workspace cut into pieces is the usual way to hold x and out."""
    memory = torch.randn(2 * 3 * 4 + 2 * 3 * 3, device=device)
    x, out = memory[:24].view(2, 3, 4), memory[24:].view(2, 3, 3)
    check(symmetric_product(x, out=out), x)
