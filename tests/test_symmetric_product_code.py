"""What the symmetric product compiles to, for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What symmetric_product_compiled.py measures."""
    pytest.importorskip("triton", reason="Triton is not installed, and compiles nothing")
    script = Path(__file__).with_name("symmetric_product_compiled.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, str(script)]
    finished = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert finished.returncode == 0, finished.stderr[-6000:]
    return list(json.loads(finished.stdout))


TENSOR_CORES = {
    "sm_80": {"bf16": "HMMA.16816.F32.BF16", "tf32": "HMMA.1688.F32.TF32"},
    "sm_90": {"bf16": "HGMMA.64x128x16.F32.BF16", "fp16": "HGMMA.64x128x16.F32", "tf32": "HGMMA.64x128x8.F32.TF32"},
    "sm_100": {"bf16": "UTCHMMA", "tf32": "UTCHMMA"},
    "gfx942": {"bf16": "v_mfma_f32_32x32x8_bf16", "fp16": "v_mfma_f32_32x32x8_f16", "fp32": "v_mfma_f32_32x32x2_f32"},
}


def test_what_is_compiled_multiplies_in_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    """And float32, left exact, only where these are exact: on AMD."""
    for row in compiled:
        if "odd" not in row["case"]:
            found = set(row["multiplications"]) - {"FFMA", "FFMA2"}
            name = row["case"].split()[0]
            assert found == {TENSOR_CORES[row["arch"]][name]} if name in TENSOR_CORES[row["arch"]] else not found, row


def test_what_is_compiled_does_not_spill(compiled: list[dict[str, Any]]) -> None:
    """Of odd sizes, gfx942 keeps some masks in lanes of vector registers, not on the stack."""
    for row in compiled:
        assert row["stack"] == 0, row
        assert row["spilled"] == 0 or (row["case"], row["arch"]) == ("bf16 odd", "gfx942"), row


def test_what_is_compiled_fits_every_gpu(compiled: list[dict[str, Any]]) -> None:
    """The shared memory of GPU 8.6 and of gfx942."""
    for row in compiled:
        assert row["shared"] <= (64 if row["arch"] == "gfx942" else 99) * 1024, row


def test_what_is_compiled_moves_128_bits_an_access(compiled: list[dict[str, Any]]) -> None:
    """On NVIDIA x past the registers, asynchronously. Triton 3.6 stores 64 bits of bfloat16 on gfx942."""
    for row in compiled:
        if "odd" not in row["case"]:
            assert row["bits"]["load"] == [128], row
            assert row["bits"]["async"] == ([] if row["arch"] == "gfx942" else [128]), row
            assert set(row["bits"]["store"]) <= ({64, 128} if row["arch"] == "gfx942" else {128}), row


def test_what_is_compiled_has_offsets_of_64_bits(compiled: list[dict[str, Any]]) -> None:
    """The one product of 32 bits is that of the tiles of a triangle."""
    for row in compiled:
        assert row["offsets"] == ["i64"], row
        assert row["products"].count("i32") == 1, row
