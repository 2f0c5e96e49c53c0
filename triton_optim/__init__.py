"""Optimizers for PyTorch, each written once as a Triton function and run by Triton, torch.compile or eagerly."""

from . import dispatch
from .adadelta import Adadelta
from .adafactor import Adafactor
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adamax import Adamax
from .amp import GradScaler
from .asgd import ASGD
from .clipping import clip_grad_norm_, clip_grad_value_
from .convert import load_master_state_dict, load_torch_state_dict, master_state_dict, to_torch_state_dict
from .explain import explain
from .foreign import convert_state_dict
from .gradient_release import GradientRelease, enable_gradient_release
from .lbfgs import LBFGS
from .lion import Lion
from .memory import MemoryReport, memory_report
from .muon import Muon, muon_param_groups
from .nadam import NAdam
from .nonlinear_cg import NonlinearCG
from .optimizer import RuleOptimizer, Variant
from .options import Options
from .radam import RAdam
from .rmsprop import RMSprop
from .rprop import Rprop
from .sgd import SGD
from .sparse_adam import SparseAdam

__version__ = "0.1.0"

__all__ = [
    "ASGD",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "GradScaler",
    "GradientRelease",
    "Lion",
    "MemoryReport",
    "Muon",
    "NAdam",
    "NonlinearCG",
    "Options",
    "RAdam",
    "RMSprop",
    "Rprop",
    "RuleOptimizer",
    "SparseAdam",
    "Variant",
    "clip_grad_norm_",
    "clip_grad_value_",
    "convert_state_dict",
    "dispatch",
    "enable_gradient_release",
    "explain",
    "load_master_state_dict",
    "load_torch_state_dict",
    "master_state_dict",
    "memory_report",
    "muon_param_groups",
    "to_torch_state_dict",
]
