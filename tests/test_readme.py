"""What README and the guides show does what they say: the ten lines, and the user's optimizer on every backend."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import pkgutil
import re
import runpy
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import triton_optim
import triton_optim.integrations
import triton_optim.race

ROOT = Path(__file__).parents[1]
README, GUIDES = ROOT / "README.md", ROOT / "docs" / "guides"


def block(page: Path, marker: str) -> str:
    (text,) = [text for text in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if marker in text]
    return text


def execute(text: str, name: str, folder: Path) -> types.ModuleType:
    """Run a block as a module of its own file: Triton reads a rule's source."""
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_ten_lines(tmp_path: Path) -> None:
    module = execute(block(README, "for _ in range(50)"), "readme_example", tmp_path)
    assert module.loss.item() < 1.0


def test_the_ways_out_of_a_codec(tmp_path: Path) -> None:
    module = execute(block(GUIDES / "precision.md", "optim.memory_report("), "readme_precision", tmp_path)
    assert module.weights["weight"].dtype == torch.float32
    assert module.checkpoint["state"][0]["exp_avg_sq"].shape == (256, 256)


def test_the_whole_step(tmp_path: Path) -> None:
    module = execute(block(GUIDES / "whole-step.md", "optim.GradScaler("), "readme_whole_step", tmp_path)
    assert 0 < module.optimizer.grad_norm < 1
    assert all("ema" in state for state in module.optimizer.state.values())


def test_muons_groups(tmp_path: Path) -> None:
    module = execute(block(GUIDES / "parameter-groups.md", "optim.Muon("), "readme_muon", tmp_path)
    assert [len(group["params"]) for group in module.optimizer.param_groups] == [1, 4]


def test_the_users_own_optimizer(backend: str, device: torch.device, tmp_path: Path) -> None:
    text = block(README, "class SignMomentum")
    assert text == block(GUIDES / "own-optimizer.md", "class SignMomentum")
    assert len(text.splitlines()) <= 30
    module = execute(text, f"readme_{backend}", tmp_path)
    start = [torch.randn(shape, device=device) for shape in [(3,), (1030,), (4, 5)]]
    gradients = [[torch.randn_like(t) for t in start] for _ in range(5)]
    params = [torch.nn.Parameter(t.clone()) for t in start]
    optimizer = module.SignMomentum(params, lr=0.01, beta=0.8, backend=backend)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    lrs = []
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for p, initial, own in zip(params, start, zip(*gradients, strict=True), strict=True):
        value, m = initial.double().cpu().numpy(), np.zeros(initial.shape)
        for lr, g in zip(lrs, own, strict=True):
            m = 0.8 * m + (1 - 0.8) * g.double().cpu().numpy()
            value = value - lr * np.sign(m)
        np.testing.assert_allclose(p.detach().cpu().numpy(), value, rtol=1e-5, atol=1e-6)
    (bucket,) = triton_optim.explain(optimizer)
    assert bucket.backend == backend
    restored = module.SignMomentum(params, backend=backend)
    restored.load_state_dict(optimizer.state_dict())
    assert torch.equal(restored.state[params[1]]["momentum"], optimizer.state[params[1]]["momentum"])


def test_numbers_and_pictures_are_those_of_the_committed_results() -> None:
    report = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))
    assert report["out_of_step"]() == [], "run python benchmarks/report.py"


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with a copy of the committed results."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.copytree(module.RESULTS, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


@pytest.mark.parametrize("number", ["figures", "text"])
def test_a_changed_result_puts_them_out_of_step(number: str, tmp_path: Path, report: Any) -> None:
    changed = tmp_path / "codec_step.json"
    found = json.loads(changed.read_text())
    record = next(r for r in found["records"] if r["case"] == "AdamW, 64M16 (16 tensors), fp32, int8 states")
    if number == "text":
        record["text"] = "ours 1 ms; 0.5 x torch-fused"
    else:
        record["figures"]["ms"] += 1
    changed.write_text(json.dumps(found))
    assert report.out_of_step() == (["performance.md", "RESULTS.md"] if number == "text" else ["codec_step.svg"])


@pytest.mark.parametrize("slow", [0, 1])
def test_the_page_on_performance_shows_how_steps_scale_and_where_they_are_slower(
    slow: int, tmp_path: Path, report: Any
) -> None:
    found = json.loads((tmp_path / "codec_step.json").read_text())
    blank = found["records"][0]
    records = []
    for i, ours in enumerate([0.5, 2.5 if slow else 0.6]):
        elements, ratio = 10 ** (3 + i), ours / 2.0
        figures = {"optimizer": "AdamW", "tensors": 10, "elements": elements, "ours ms": ours, "torch-fused ms": 2.0}
        own = {"figures": figures | {"peer": "torch-fused", "ratio": ratio}, "met": ratio <= 1.05, "target": 1.05}
        records.append(blank | own | {"case": f"AdamW, 10 tensors, 1e{3 + i} elements", "text": f"{ratio} x"})
    (tmp_path / "scaling.json").write_text(json.dumps(found | {"question": "scaling", "records": records}))
    assert "scaling.svg" in report.out_of_step()
    said = f"at {slow} of 2 points" + (": AdamW, 10 tensors, 1e4 elements (1.25 x)." if slow else ".")
    assert (
        f"](../benchmarks/results/scaling.svg)\n\nSlower than the fastest of torch's by over 5 % {said}"
        in report.headlines()
    )
    title, data, save = report.pictures()["scaling"]
    assert data == {"AdamW": {"10 tensors": [(1000, 0.5, 2.0), (10000, 2.5 if slow else 0.6, 2.0)]}}
    save(tmp_path / "scaling.svg", data, title)
    assert "scaling.svg" not in report.out_of_step()
    assert ">10 tensors<" in (tmp_path / "scaling.svg").read_text()


def modules() -> list[str]:
    """All, in the order of their names."""
    found = pkgutil.walk_packages(triton_optim.__path__, "triton_optim.")
    return ["triton_optim", *(m.name for m in found if not m.name.endswith("__main__"))]


@pytest.mark.parametrize("name", modules())
def test_the_examples_in_docstrings(name: str) -> None:
    if ".backends.triton" in name or name.endswith(("multi_tensor", "kernels.symmetric_product")):
        pytest.importorskip("triton", reason="this module is Triton's")
    if name.startswith("triton_optim.integrations."):
        trainer = name.split(".")[-1].replace("transformers", "accelerate")
        pytest.importorskip(trainer, reason="this module is for those who have the trainer")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def reference() -> str:
    return "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))


@pytest.mark.parametrize("name", triton_optim.__all__)
def test_every_public_name_is_in_readme_or_the_reference(name: str) -> None:
    listed = f"`{name}`" in README.read_text() or f"`{name}`" in (GUIDES / "wrappers.md").read_text()
    assert listed or re.search(rf"^::: triton_optim\.{name}\b", reference(), re.M)


@pytest.mark.parametrize("name", triton_optim.race.__all__)
def test_every_name_of_the_race_is_in_the_reference(name: str) -> None:
    module = getattr(triton_optim.race, name).__module__
    assert re.search(rf"^::: {re.escape(module)}\.{name}\b", reference(), re.M)


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(triton_optim.integrations.__path__)])
def test_every_trainer_is_in_the_reference(name: str) -> None:
    assert f"::: triton_optim.integrations.{name}." in reference()
