"""Settings that published benchmarks and papers tuned: where a search for the learning rate may begin.

Each is a fact with its source, of another model and of many more steps than a race has. Optimizers without one begin at
the defaults of their classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

LLM = "tuned for language models of 124M parameters, https://arxiv.org/abs/2509.01440"
ALGOPERF = "AlgoPerf's self-tuning baseline, https://github.com/mlcommons/submissions_algorithms"
RESNET = "ResNet on ImageNet, https://arxiv.org/abs/1512.03385"


class Setting(NamedTuple):
    """What was found good.

    Attributes:
        lr: the learning rate.
        options: the other keywords.
        source: who found it, on what, and where that stands.
    """

    lr: float
    options: Mapping[str, Any]
    source: str


DECAY = {"weight_decay": 0.1}
# By the names of the optimizers, in lower case. Those of LLM are of scripts/124m in github.com/epfml/llm-baselines, the
# authors' code, without their warm-up of 2,000 of 128,000 steps and the clipping of the norm at 0.5.
SETTINGS: dict[str, Setting] = {
    "adamw": Setting(1e-3, {"betas": (0.8, 0.999), **DECAY}, LLM),
    "ademamix": Setting(1e-3, {"betas": (0.9, 0.999, 0.999), "alpha": 8.0, **DECAY}, LLM),
    "adopt": Setting(1e-3, {"betas": (0.9, 0.999), "decoupled_weight_decay": True, **DECAY}, LLM),
    "lion": Setting(1e-3, {"betas": (0.9, 0.99), **DECAY}, LLM),
    "marsadamw": Setting(3e-3, {"betas": (0.95, 0.99), "gamma": 0.025, **DECAY}, LLM),
    "muon": Setting(1e-3, {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw", **DECAY}, LLM),
    "nadamw": Setting(1.908e-3, {"betas": (0.9091, 0.9989), "weight_decay": 0.08122}, ALGOPERF),
    "prodigy": Setting(1.0, {"use_bias_correction": True, **DECAY}, LLM),
    "schedulefreeadamw": Setting(1e-3, {"betas": (0.9, 0.9999), **DECAY}, LLM),
    "sgd": Setting(0.1, {"momentum": 0.9, "weight_decay": 1e-4}, RESNET),
    "signum": Setting(1e-3, {"momentum": 0.9, **DECAY}, LLM),
    "soap": Setting(1e-3, {"betas": (0.9, 0.999), **DECAY}, LLM),
    "sophiag": Setting(1e-3, {"betas": (0.9, 0.999), "rho": 0.04, **DECAY}, LLM),
}
# Learning rates between the best ones on digits and charlm, where a search begins on these.
SMALL = {
    "lion": 5e-3,
    "muon": 1e-2,
    **dict.fromkeys(("adam", "adamw", "nadam", "rmsprop"), 1.5e-2),
    "adamax": 3e-2,
    **dict.fromkeys(("adafactor", "adagrad", "radam"), 0.1),
    **dict.fromkeys(("sgd", "asgd"), 0.3),
}
