"""Optimizers with every codec: the same on every backend, near float32, into every other codec, and what is refused."""

import argparse
import functools
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from codec_training import ADAMW, BF16, KEPT, RULES, everything, go_on, kept, kept_on_backends, trained, trained_once
from side_by_side import nearest_roots
from table import Case, rows
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.cli import memory as command
from triton_optim.core.convert import master

# In optimizers.


@cache
def trained_with_nearest_roots(
    cls: Any, name: str, device: torch.device, options: tuple[tuple[str, Any], ...]
) -> tuple[list[Parameter], triton_optim.RuleOptimizer]:
    """Eagerly."""
    with nearest_roots():
        return trained_once.__wrapped__(cls, name, "eager", device, options)


@rows(*(case for case in RULES if case.on_every_backend))
@kept_on_backends
def test_same_on_every_backend(case: Case, name: str, backend: str, device: torch.device) -> None:
    """As eagerly with roots that are the nearest numbers: bit for bit on a CPU. Kernels on a GPU round divisions and
    roots in their own way: a few elements in thousands differ.
    """
    if backend == "eager":
        pytest.skip("the others are compared with it")
    if case.settings.get("centered") and "state_dtype" in KEPT[name][1]:
        pytest.skip("centered needs exact states: tests below")
    if not (case.name in ("AdamW", "Lion", "Adagrad") or name in ("stochastic int8", "split24")):
        pytest.skip("the codecs are the same for every rule: two of them for all, all of them for three")
    if backend == "compiled" and case.name != "AdamW" and name != "stochastic int8":
        pytest.skip("each takes seconds to compile: AdamW has all of them, and every rule one")
    options = tuple(case.settings.items())
    ends = [everything(*trained_with_nearest_roots(case.ours, name, device, options)),
            everything(*trained(case.ours, name, backend, device, **case.settings))]  # fmt: skip
    different = 0
    for a, b in zip(*ends, strict=True):
        different += int((a != b).sum())
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=0.02, atol=1e-3)
    assert different <= (0.0 if device.type == "cpu" else 0.004) * sum(a.numel() for a in ends[0])


@kept_on_backends
def test_close_to_float32(name: str, backend: str, device: torch.device) -> None:
    dtype, _ = KEPT[name]
    params, optimizer = trained(triton_optim.AdamW, name, backend, device, **ADAMW.settings)
    wide = [Parameter(torch.empty_like(p, dtype=torch.float32)) for p in params]
    random = torch.Generator().manual_seed(0)
    for w in wide:
        w.data.copy_(torch.randn(w.shape, generator=random).to(dtype))
    go_on(wide, torch.optim.AdamW(wide, **ADAMW.settings), range(3))
    for p, w in zip(params, wide, strict=True):
        tolerance = 0.012 if "int4" in name else 0.004
        tolerance += 0.016 if "stochastic" in name else 0
        assert float((master(p, optimizer).float() - w).detach().abs().mean()) < tolerance / 2
    assert any(isinstance(v, Tensor) and v.dtype == torch.int8 for v in optimizer.state[params[0]].values()) == (
        "int" in name or "split" in name
    )


# Memory.


@kept
def test_the_report_is_what_is_there(name: str, device: torch.device) -> None:
    params, optimizer = trained(triton_optim.AdamW, name, "eager", device)
    report = triton_optim.memory_report(optimizer)
    there = [v for p in params for n, v in optimizer.state[p].items() if n != "step"]
    assert sum(report.states.values()) + report.corrections == sum(t.nbytes for t in there)
    assert report.weights == report.gradients == sum(p.nbytes for p in params)
    assert report.torch_total == 4 * report.weights
    before = triton_optim.memory_report(triton_optim.AdamW(params, **KEPT[name][1]))
    assert before == report
    assert "exp_avg_sq" in repr(report)


def asked(**options: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = parser.parse_args(["--params", "7e9"])
    vars(given).update(options)
    return given


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(asked(state="int8", precision="stochastic")) == 0
    lines = capsys.readouterr().out.splitlines()
    total = next(line.split() for line in lines if line.startswith("total"))
    left = next(line.split() for line in lines if line.startswith("without"))
    assert float(total[1]) <= 6.1
    assert float(left[2]) <= 4.1
    assert command.run(asked(offload=True)) == 0
    assert 'offload="cpu"' in capsys.readouterr().out
    assert command.run(asked(dtype="float32")) == 0
    total = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("total"))
    assert total[1:3] == ["16.000", "16.000"]


def test_the_commands_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, which draws it")
    assert command.run(asked(precision="split24", plot=tmp_path / "memory.svg")) == 0
    assert str(tmp_path / "memory.svg") in capsys.readouterr().out
    assert "<svg" in (tmp_path / "memory.svg").read_text()


def test_bars_are_of_every_state_dtype() -> None:
    p = Parameter(torch.empty(1 << 20, dtype=torch.bfloat16, device="meta"))
    build = functools.partial(triton_optim.AdamW, [p], param_precision="split24")
    bars = command.bars(build)
    assert list(bars) == ["torch.optim", "as it comes", *(f"state_dtype={x}" for x in ("float32", "int8", "int4"))]
    assert bars["torch.optim"] == {"weights": 2, "gradients": 2, "exp_avg": 2, "exp_avg_sq": 2}
    assert bars["as it comes"] == bars["torch.optim"] | {"corrections": 1}
    assert sum(bars["state_dtype=int8"].values()) == pytest.approx(7.03, abs=0.01)
    refused = command.bars(functools.partial(triton_optim.Adafactor, [p]))  # int8 of row_var
    assert list(refused) == ["torch.optim", "as it comes"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optimizer": "adamm"}, "Choose from .*adamw"),
        ({"params": -1.0}, "Try 7e9"),
        ({"dtype": "float32", "precision": "split32"}, "split32 is for parameters of 16 bits.*Give --dtype bfloat16"),
        ({"optimizer": "adafactor", "state": "int8"}, "row_var"),
        ({"plot": Path("memory.txt")}, "names no image format. Use .png"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(asked(**options)) == 1
    assert re.search(says, capsys.readouterr().err)


# What is left alone, and what is refused.


def test_what_keeps_full_precision(backend: str, device: torch.device) -> None:
    if backend == "compiled":
        pytest.skip("takes seconds to compile, and what is kept is decided before a backend is chosen")
    shapes = {"small": (63, 65), "just": (64, 64), "large": (64, 65), "embedding": (100, 64), "turned": (64, 65)}
    params = {n: Parameter(torch.ones(shape, dtype=BF16, device=device)) for n, shape in shapes.items()}
    params["turned"] = Parameter(torch.ones(65, 64, dtype=BF16, device=device).t())
    exempt = {"params": [params.pop("embedding")], "state_dtype": torch.float32}
    optimizer = triton_optim.AdamW([{"params": list(params.values())}, exempt], state_dtype="int8", backend=backend)
    for p in (*params.values(), *exempt["params"]):
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = {n: optimizer.state[p]["exp_avg"].dtype for n, p in params.items()}
    assert kept == {"small": torch.float32, "just": torch.int8, "large": torch.int8, "turned": torch.float32}
    assert optimizer.state[exempt["params"][0]]["exp_avg"].dtype == torch.float32


def refused(cls: Any, p: Tensor, says: str, **options: Any) -> None:
    error = ValueError if says.startswith("Invalid") else RuntimeError
    with pytest.raises(error, match=says):
        cls([Parameter(p)], **options)
    optimizer = cls([Parameter(torch.ones(64, 64))])
    precision = {name: value for name, value in options.items() if name in ("state_dtype", "param_precision")}
    others = {name: value for name, value in options.items() if name not in precision}
    with pytest.raises(error, match=says):
        optimizer.add_param_group({"params": [Parameter(p)], **precision, **others})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("cls", "dtype", "options", "says"),
    [
        (triton_optim.AdamW, torch.float32, {"state_dtype": torch.int8}, "Invalid state_dtype"),
        (triton_optim.AdamW, torch.float32, {"state_dtype": "int5"}, "Invalid state_dtype: 'int5'. Use .*int8"),
        (triton_optim.AdamW, BF16, {"param_precision": "exact"}, "Invalid param_precision: 'exact'. Use .*split24"),
        (triton_optim.AdamW, torch.complex64, {"state_dtype": "int8"}, "complex"),
        (triton_optim.AdamW, torch.complex64, {"state_dtype": BF16}, "complex"),
        (triton_optim.AdamW, BF16, {"param_precision": "kahan", "differentiable": True}, "derivative"),
        (triton_optim.Adafactor, BF16, {"state_dtype": "int8"}, "row_var"),
        (triton_optim.SparseAdam, BF16, {"param_precision": "stochastic"}, "rows"),
        (triton_optim.RMSprop, torch.float32, {"state_dtype": "int8", "centered": True}, "centered=False"),
    ],
)
def test_refused(cls: Any, dtype: torch.dtype, options: dict[str, Any], says: str) -> None:
    refused(cls, torch.ones(64, 64, dtype=dtype), says, **options)


@pytest.mark.parametrize("precision", ["stochastic", "kahan", "split24", "split32", "master"])
def test_wide_parameters_beside_those_that_are_rounded_stay_as_they_are(precision: str, backend: str) -> None:
    """As adapters in float32 on a model in bfloat16."""
    torch.manual_seed(0)
    narrow, wide = Parameter(torch.randn(4099).to(BF16)), Parameter(torch.randn(64, 80))
    twin = Parameter(wide.detach().clone())
    optimizer = triton_optim.AdamW([narrow, wide], lr=0.1, param_precision=precision, backend=backend)
    plain = triton_optim.AdamW([twin], lr=0.1, backend=backend)
    for step in range(3):
        torch.manual_seed(step)
        narrow.grad = torch.randn(4099).to(BF16)
        wide.grad = twin.grad = torch.randn(64, 80)
        optimizer.step()
        plain.step()
    assert torch.equal(wide, twin)
    assert sorted(optimizer.state[wide]) == sorted(plain.state[twin])
    rows = {str(row.dtypes["p"]): row for row in triton_optim.explain(optimizer)}
    assert rows["torch.float32"].kept == {}
    assert rows["torch.bfloat16"].kept == {"p": f"bfloat16 {precision}"}
    assert f"p bfloat16 {precision}, g bfloat16, exp_avg bfloat16" in repr(triton_optim.explain(optimizer))
    assert triton_optim.memory_report(optimizer).corrections == {
        "stochastic": 0, "kahan": 2, "split24": 1, "split32": 2, "master": 4
    }[precision] * 4099  # fmt: skip


def test_parameters_that_become_narrow_after_the_optimizer_was_made() -> None:
    """As trainers do that make a model bfloat16 once all is set up."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8, bias=False)
    optimizer = triton_optim.AdamW(model.parameters(), lr=1e-4, param_precision="kahan", backend="eager")
    model.to(BF16)
    model.weight.grad = torch.ones(8, 8, dtype=BF16)
    optimizer.step()
    assert optimizer.state[model.weight]["compensation"].dtype == BF16


def test_a_sparse_gradient_is_refused_where_more_is_kept() -> None:
    table = torch.nn.Embedding(100, 64, sparse=True)
    optimizer = triton_optim.Adagrad(table.parameters(), state_dtype="int8", backend="eager")
    table(torch.tensor([3])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"sparse.*int8.*state_dtype=None"):
        optimizer.step()
    assert torch.equal(table.weight, before)


def test_bytes_moved() -> None:
    expected = {
        ("storage", None): 14,
        ("kahan", BF16): 18,
        ("split24", BF16): 16,
        ("split32", BF16): 18,
        ("master", BF16): 20,  # the copy is read and written, and the parameter written
        ("stochastic", "int8"): 10.1,
        ("stochastic", "int4"): 8.2,
    }
    for (precision, state_dtype), most in expected.items():
        p = Parameter(torch.ones(1024, 256, dtype=BF16))
        optimizer = triton_optim.AdamW([p], param_precision=precision, state_dtype=state_dtype, backend="compiled")
        (bucket,) = triton_optim.explain(optimizer)
        assert most - 0.1 <= bucket.bytes_per_parameter <= most
