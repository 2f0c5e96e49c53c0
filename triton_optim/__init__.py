"""Optimizers for PyTorch, each written once as a Triton function and run by Triton, torch.compile or eagerly."""

from . import dispatch
from .adam import Adam, AdamW
from .explain import explain
from .lbfgs import LBFGS
from .lion import Lion
from .nonlinear_cg import NonlinearCG
from .optimizer import RuleOptimizer, Variant
from .sgd import SGD

__version__ = "0.1.0"

__all__ = [
    "LBFGS",
    "SGD",
    "Adam",
    "AdamW",
    "Lion",
    "NonlinearCG",
    "RuleOptimizer",
    "Variant",
    "dispatch",
    "explain",
]
