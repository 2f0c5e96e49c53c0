"""Optimizers for PyTorch, each written once as a Triton function and run by Triton, torch.compile or eagerly."""

from torch.optim import Optimizer, lr_scheduler, swa_utils

from . import dispatch
from .core.convert import (
    convert_state_dict,
    load_master_state_dict,
    load_torch_state_dict,
    master_state_dict,
    to_torch_state_dict,
)
from .core.explain import explain
from .core.memory import MemoryReport, memory_report
from .core.optimizer import RuleOptimizer
from .optimizers.adabelief import AdaBelief
from .optimizers.adadelta import Adadelta
from .optimizers.adafactor import Adafactor
from .optimizers.adafactor_relative import AdafactorRelative
from .optimizers.adagrad import Adagrad
from .optimizers.adam import Adam, AdamW
from .optimizers.adam_atan2 import AdamAtan2
from .optimizers.adamax import Adamax
from .optimizers.adamc import AdamC
from .optimizers.adamh import AdamH
from .optimizers.adan import Adan
from .optimizers.ademamix import AdEMAMix, SimplifiedAdEMAMix
from .optimizers.adopt import ADOPT
from .optimizers.asgd import ASGD
from .optimizers.came import CAME
from .optimizers.closure.lbfgs import LBFGS
from .optimizers.closure.nonlinear_cg import NonlinearCG
from .optimizers.dadapt_adam import DAdaptAdam
from .optimizers.dadapt_lion import DAdaptLion
from .optimizers.dadapt_sgd import DAdaptSGD
from .optimizers.grams import Grams
from .optimizers.lamb import LAMB
from .optimizers.laprop import LaProp
from .optimizers.lars import LARS
from .optimizers.lion import Lion
from .optimizers.mars import MARSAdamW, MARSLion
from .optimizers.matrix.adamuon import AdaMuon
from .optimizers.matrix.kl_soap import KLSOAP
from .optimizers.matrix.muon import Muon
from .optimizers.matrix.muonh import MuonH
from .optimizers.matrix.normuon import NorMuon
from .optimizers.matrix.param_groups import muon_param_groups
from .optimizers.matrix.scion import Scion
from .optimizers.matrix.shampoo import Shampoo
from .optimizers.matrix.soap import SOAP
from .optimizers.nadam import NAdam
from .optimizers.nadamw import NAdamW
from .optimizers.novograd import NovoGrad
from .optimizers.prodigy import Prodigy
from .optimizers.radam import RAdam
from .optimizers.rmsprop import RMSprop
from .optimizers.rprop import Rprop
from .optimizers.schedule_free import ScheduleFreeAdamW, ScheduleFreeRAdam, ScheduleFreeSGD
from .optimizers.sgd import SGD
from .optimizers.signum import Signum, Tiger
from .optimizers.sophia import SophiaG
from .optimizers.sparse_adam import SparseAdam
from .optimizers.stable_adamw import StableAdamW
from .options import Options
from .spec import State, Variant
from .training.amp import GradScaler
from .training.clipping import clip_grad_norm_, clip_grad_value_
from .training.gradient_release import GradientRelease, enable_gradient_release
from .training.mup import mup_param_groups
from .wrappers import (
    Wrapper,
    cautious,
    cautious_decay,
    centralized,
    clip_update,
    decoupled_decay,
    lookahead,
    nesterov,
)

__version__ = "0.1.0"

__all__ = [
    "ADOPT",
    "ASGD",
    "CAME",
    "KLSOAP",
    "LAMB",
    "LARS",
    "LBFGS",
    "SGD",
    "SOAP",
    "AdEMAMix",
    "AdaBelief",
    "AdaMuon",
    "Adadelta",
    "Adafactor",
    "AdafactorRelative",
    "Adagrad",
    "Adam",
    "AdamAtan2",
    "AdamC",
    "AdamH",
    "AdamW",
    "Adamax",
    "Adan",
    "DAdaptAdam",
    "DAdaptLion",
    "DAdaptSGD",
    "GradScaler",
    "GradientRelease",
    "Grams",
    "LaProp",
    "Lion",
    "MARSAdamW",
    "MARSLion",
    "MemoryReport",
    "Muon",
    "MuonH",
    "NAdam",
    "NAdamW",
    "NonlinearCG",
    "NorMuon",
    "NovoGrad",
    "Optimizer",
    "Options",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "Rprop",
    "RuleOptimizer",
    "ScheduleFreeAdamW",
    "ScheduleFreeRAdam",
    "ScheduleFreeSGD",
    "Scion",
    "Shampoo",
    "Signum",
    "SimplifiedAdEMAMix",
    "SophiaG",
    "SparseAdam",
    "StableAdamW",
    "State",
    "Tiger",
    "Variant",
    "Wrapper",
    "cautious",
    "cautious_decay",
    "centralized",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_update",
    "convert_state_dict",
    "decoupled_decay",
    "dispatch",
    "enable_gradient_release",
    "explain",
    "load_master_state_dict",
    "load_torch_state_dict",
    "lookahead",
    "lr_scheduler",
    "master_state_dict",
    "memory_report",
    "muon_param_groups",
    "mup_param_groups",
    "nesterov",
    "swa_utils",
    "to_torch_state_dict",
]
