"""How long is a step in each codec on a CPU, beside torch's fused steps in float32 and bfloat16?"""

from collections.abc import Callable
from typing import Any

import torch

import triton_optim
from triton_optim.bench.agreement import Contender, differences
from triton_optim.bench.comparison import STATE_SHARES
from triton_optim.bench.measure import Side, measure
from triton_optim.bench.models import elements, parameters, shapes

MODEL = "64M16"
BF16 = torch.bfloat16
OPTIONS = {"lr": 0.1, "weight_decay": 0.1}
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
FUSED = {"fused fp32": torch.float32, "fused bf16": BF16}


def fused(name: str) -> Contender:
    params = list(parameters(shapes(MODEL), dtype=FUSED[name]))
    optimizer = torch.optim.AdamW(params, fused=True, **OPTIONS)
    return Contender(name, optimizer, params, optimizer.step)


def ours(name: str) -> Contender:
    dtype, options, _ = CODECS[name]
    params = list(parameters(shapes(MODEL), dtype=dtype))
    optimizer = triton_optim.AdamW(params, **options, **OPTIONS)
    return Contender(name, optimizer, params, optimizer.step, STATE_SHARES.get(options.get("state_dtype")))


def test_codecs(benchmark: Callable, answer: Callable, patience: float) -> None:
    peers, own = [fused(name) for name in FUSED], [ours(name) for name in CODECS]
    for (name, dtype), peer in zip(FUSED.items(), peers, strict=True):
        found = differences([peer, *(c for c in own if CODECS[c.name][0] == dtype)])
        wrong = {codec: d.reason() for codec, d in found.items() if not d.same}
        assert not wrong, f"beside {name}: {wrong}"

    m = measure([Side(c.name, c.step) for c in [*peers, *own]], patience, rounds=5)

    fp32, bf16 = (1e3 * m.median(name) for name in FUSED)
    for contender in own:
        codec, target = contender.name, CODECS[contender.name][2]
        ratios, words = m.compared(codec, ["fused fp32"])
        ms = 1e3 * m.median(codec)
        (bucket,) = triton_optim.explain(contender.optimizer)
        moved = bucket.bytes_per_parameter
        figures = ratios | {"ms": ms, "fused fp32 ms": fp32, "fused bf16 ms": bf16, "bytes a parameter": moved}
        figures |= {"GB/s": moved * elements(shapes(MODEL)) / ms / 1e6, "backend": bucket.backend}
        text = f"{moved:.4g} bytes a parameter, {ms:.1f} ms; {words}"
        case = f"AdamW, {MODEL} ({len(shapes(MODEL))} tensors), {codec}"
        answer(case, text, figures, value=ratios["ratio"], target=target, measurement=m)
        if codec == "bf16 stochastic, bf16 states":
            ratios, words = m.compared(codec, ["fused bf16"])
            answer(f"{case}, beside bf16", words, ratios, value=ratios["ratio"], target=1.0, measurement=m)
    benchmark.pedantic(own[1].step, rounds=3)
