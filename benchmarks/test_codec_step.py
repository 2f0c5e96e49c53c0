"""How long is a step in each codec on a CPU (compiled backend), beside torch's fused steps in float32 and bfloat16?"""

from collections.abc import Callable
from typing import Any

import torch
from harness import Side, measure
from models import MODELS, elements, parameters

import triton_optim

MODEL = "64M in 16"
BF16 = torch.bfloat16
OPTIONS = {"lr": 0.1, "weight_decay": 0.01}
# Parameter dtype, options, and the target for the ratio to torch's fused step in float32.
CODECS: dict[str, tuple[torch.dtype, dict[str, Any], float]] = {
    "bf16 storage": (BF16, {}, 2.0),
    "bf16 stochastic, bf16 states": (BF16, {"param_precision": "stochastic", "state_dtype": BF16}, 1.0),
    "bf16 kahan": (BF16, {"param_precision": "kahan"}, 2.0),
    "bf16 split24": (BF16, {"param_precision": "split24"}, 2.0),
    "bf16 split32": (BF16, {"param_precision": "split32"}, 2.0),
    "bf16 master": (BF16, {"param_precision": "master"}, 2.0),
    "fp32, int8 states": (torch.float32, {"state_dtype": "int8"}, 2.0),
    "bf16 stochastic, int8 states": (BF16, {"param_precision": "stochastic", "state_dtype": "int8"}, 2.0),
    "bf16 stochastic, int4 states": (BF16, {"param_precision": "stochastic", "state_dtype": "int4"}, 2.0),
}


def in_dtype(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    params = []
    for p in parameters(MODEL):
        own = torch.nn.Parameter(p.detach().to(dtype))
        own.grad = p.grad.to(dtype)
        params.append(own)
    return params


def test_codecs(benchmark: Callable, answer: Callable, patience: float) -> None:
    optimizers = {f"fused {kind}": torch.optim.AdamW(in_dtype(dtype), fused=True, **OPTIONS) for kind, dtype in
                  (("fp32", torch.float32), ("bf16", BF16))}  # fmt: skip
    optimizers |= {
        codec: triton_optim.AdamW(in_dtype(dtype), **options, **OPTIONS)
        for codec, (dtype, options, _) in CODECS.items()
    }
    exact = [p for group in optimizers["fused fp32"].param_groups for p in group["params"]]
    for _ in range(2):
        for optimizer in optimizers.values():
            optimizer.step()
    for codec in CODECS:
        optimizer = optimizers[codec]
        (bucket,) = triton_optim.explain(optimizer)
        assert bucket.backend == "compiled"
        own = [p for group in optimizer.param_groups for p in group["params"]]
        for p, q in zip(own[:2], exact[:2], strict=True):  # each has moved by 0.2
            assert float((triton_optim.convert.master(p, optimizer).float() - q).detach().abs().mean()) < 0.03

    m = measure([Side(name, optimizer.step) for name, optimizer in optimizers.items()], patience, rounds=5)

    fp32, bf16 = (1e3 * m.median(f"fused {kind}") for kind in ("fp32", "bf16"))
    for codec, (_, _, target) in CODECS.items():
        ratios, words = m.compared(codec, ["fused fp32"])
        ms = 1e3 * m.median(codec)
        moved = triton_optim.explain(optimizers[codec])[0].bytes_per_parameter
        figures = ratios | {"ms": ms, "fused fp32 ms": fp32, "fused bf16 ms": bf16, "bytes a parameter": moved}
        figures["GB/s"] = moved * elements(MODEL) / ms / 1e6
        text = f"{moved:.4g} bytes a parameter, {ms:.1f} ms; {words}"
        case = f"AdamW, {MODEL} ({len(MODELS[MODEL])} tensors), {codec}"
        answer(case, text, figures, value=ratios["ratio"], target=target, measurement=m)
        if codec == "bf16 stochastic, bf16 states":
            ratios, words = m.compared(codec, ["fused bf16"])
            answer(f"{case}, beside bf16", words, ratios, value=ratios["ratio"], target=1.0, measurement=m)
    benchmark.pedantic(optimizers["bf16 stochastic, bf16 states"].step, rounds=3)
