"""Our words for torch's compiler are there for what we compile, and for nothing else."""

import threading

import torch

import triton_optim
from triton_optim.backends.compiled import vector_code
from triton_optim.backends.compiled.graph import rounded


def numbers() -> torch.Tensor:
    """Of all exponents, NaN, Inf and ties among them."""
    random = torch.Generator().manual_seed(0)
    some = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=random, dtype=torch.int32)
    ties = (some & -0x10000) | 0x8000
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-45])
    return torch.cat((some.view(torch.float32), ties.view(torch.float32), special))


def assert_rounds(found: torch.Tensor, x: torch.Tensor) -> None:
    expected = x.to(torch.bfloat16)
    assert torch.equal(found.isnan(), x.isnan())
    assert torch.equal(found[~x.isnan()], expected[~x.isnan()])


def test_rounding_is_torchs() -> None:
    x = numbers()
    both = rounded(x)
    assert_rounds(both.to(torch.bfloat16), x)
    assert (both.view(torch.int32)[~x.isnan()] & 0xFFFF == 0).all()


def test_what_others_compile_rounds_as_ever() -> None:
    """Ours drops what is below a bfloat16 number, of which there is nothing."""
    p = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    triton_optim.AdamW([p], backend="compiled", param_precision="stochastic").step()
    x = numbers()
    assert_rounds(torch.compile(lambda x: (x * 1.0).to(torch.bfloat16))(x), x)


def test_another_thread_has_inductors_words() -> None:
    word = vector_code._or_before(lambda: "ours", lambda: "theirs")
    found = []
    with vector_code.vector_code():
        thread = threading.Thread(target=lambda: found.append(word()))
        thread.start()
        thread.join()
        found.append(word())
    assert [*found, word()] == ["theirs", "ours", "theirs"]


def test_vector_code_is_used() -> None:
    """A torch that has other places for these words would make the steps slow, and say nothing."""
    from torch._inductor.codegen import cpp

    with vector_code.vector_code():
        pass
    own = ("arange", "get_to_dtype_expr", "_get_vec_load_line", "_get_store_line")
    words = (cpp.CppVecOverrides.to_dtype_bitcast, *(getattr(cpp.CppVecKernel, name) for name in own))
    assert all(hasattr(word, "__wrapped__") for word in words)
