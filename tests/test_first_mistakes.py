"""What users give by mistake in their first hour: each is refused where it is given, with value, cause and fix."""

import inspect

import pytest
import torch
from complaints import Unchanged, explains
from table import CASES, rows
from torch.nn import Linear, Parameter

import triton_optim
from triton_optim.core.checks import declared_numbers
from triton_optim.core.optimizer import RuleOptimizer
from triton_optim.registry import optimizers

OPTIMIZERS = optimizers()
each_optimizer = pytest.mark.parametrize("cls", OPTIMIZERS.values(), ids=OPTIMIZERS)


def matrix():
    return Parameter(torch.ones(4, 4))


# `import triton_optim as optim`


def test_what_torch_optim_has_beside_its_optimizers_is_here():
    for name in ("Optimizer", "lr_scheduler", "swa_utils"):
        assert getattr(triton_optim, name) is getattr(torch.optim, name)
        assert name in triton_optim.__all__
    assert {"optimizer", "ruleoptimizer"}.isdisjoint(OPTIMIZERS)


# Numbers, and tuples of numbers


def mistaken(default, none):
    """Values in place of a default, each with the error that it raises."""
    if not isinstance(default, tuple):
        return [("0.1", TypeError)] + [(None, TypeError)] * (not none)
    texts = tuple(map(str, default))
    return [
        (0.5, TypeError),
        (None, TypeError),
        ("0.9,0.999", TypeError),
        (torch.tensor(0.5), TypeError),
        (texts, TypeError),
        (default[:-1], IndexError),
        ((*default, 0.5), ValueError),
    ]


@each_optimizer
def test_a_hyperparameter_that_is_no_number(cls):
    """Of every number and tuple in the signature, in the constructor."""
    found = declared_numbers(cls)
    written = {name: argument.default for name, argument in inspect.signature(cls.__init__).parameters.items()}
    numbers = {n for n, value in written.items() if type(value) in (int, float) or (type(value) is tuple)}
    assert found.keys() >= numbers - {"ns_coefficients"}
    for name, (default, none) in found.items():
        if name not in written:  # of the class that this one is made of
            continue
        for wrong, kind in mistaken(default, none):
            with pytest.raises(kind) as error:
                cls([matrix()], **{name: wrong})
            explains(error, "Invalid", "learning rate" if name == "lr" else name)
            assert str(wrong) in str(error.value) or isinstance(wrong, tuple), error.value


@pytest.mark.parametrize("wrong", [0.5, None, ("3", "4", "5"), (None, None, None)], ids=str)
def test_coefficients_that_are_no_numbers(wrong):
    with pytest.raises(ValueError, match="Invalid ns_coefficients") as error:
        triton_optim.Muon([matrix()], ns_coefficients=wrong)
    explains(error, wrong)


@each_optimizer
def test_a_list_is_a_tuple(cls):
    """As files of settings have it."""
    for name, (default, _) in declared_numbers(cls).items():
        if isinstance(default, tuple):
            assert cls([matrix()], **{name: list(default)}).param_groups[0][name] == default
            assert cls([{"params": [matrix()], name: list(default)}]).param_groups[0][name] == default


class Two(RuleOptimizer):
    """A user's own."""

    rule = triton_optim.SGD.variants[0].rule

    def __init__(self, params, lr=0.1, nus=(0.7, 1.0), steps: int | None = 3, **options):
        super().__init__(params, {"lr": lr, "nus": nus, "steps": steps}, **options)

    def scalars(self, group, step):
        first, second = group["nus"]
        own = {**group, "weight_decay": 0, "momentum": first, "dampening": second}
        return triton_optim.SGD.scalars(self, own, step)


class Three(Two):
    """Hands on what it does not name."""

    def __init__(self, params, **others):
        super().__init__(params, **others)


MISTAKEN = [("nus", 0.7), ("nus", (0.7,)), ("nus", (0.7, "1.0")), ("nus", (1, 2, 3)), ("lr", None), ("steps", "3")]


@pytest.mark.parametrize("cls", [Two, Three, triton_optim.cautious(Two)], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(("name", "wrong"), MISTAKEN, ids=str)
def test_a_users_own_optimizer_is_checked_alike(cls, name, wrong):
    """In the constructor, in a group, in one that is added, and in one that is edited, by the step that sees it."""
    with pytest.raises((TypeError, ValueError, IndexError)) as error:
        cls([matrix()], **{name: wrong})
    says = str(error.value)
    kind = error.type
    with pytest.raises(kind) as error:
        cls([{"params": [matrix()], name: wrong}])
    assert str(error.value) == says
    p = matrix()
    optimizer = cls([p], backend="eager", steps=None)
    with pytest.raises(kind) as error, Unchanged(optimizer):
        optimizer.add_param_group({"params": [matrix()], name: wrong})
    assert str(error.value) == says
    p.grad = torch.ones_like(p)
    optimizer.param_groups[0][name] = wrong
    for _ in range(2):
        with pytest.raises(kind) as error:
            optimizer.step()
        assert str(error.value) == says
    assert p.eq(1).all()


# Names


USUAL = [
    ("learning_rate", "lr"),
    ("wd", "weight_decay"),
    ("l2", "weight_decay"),
    ("epsilon", "eps"),
    ("beta1", "betas"),
    ("clip_norm", "max_grad_norm"),
]


@pytest.mark.parametrize(("name", "meant"), USUAL)
def test_what_others_call_a_hyperparameter(name, meant):
    with pytest.raises(TypeError, match=f"{name}=0.5. Did you mean {meant}?"):
        triton_optim.AdamW([matrix()], **{name: 0.5})
    p, says = matrix(), f"AdamW has {name}={{}}, which nothing reads. If {meant} was meant, rename it"
    with pytest.warns(RuntimeWarning, match=says.format(0.5)):
        optimizer = triton_optim.AdamW([{"params": [p], name: 0.5}], backend="eager")
    optimizer.param_groups[0][name] = 0.25
    p.grad = torch.ones_like(p)
    with pytest.warns(RuntimeWarning, match=says.format(0.25)):
        optimizer.step()


@pytest.mark.parametrize(
    ("cls", "name", "meant"),
    [
        (triton_optim.lookahead(triton_optim.AdamW), "alpha", "lookahead_alpha"),
        (triton_optim.lookahead(triton_optim.AdamW), "steps", "lookahead_steps"),
        (triton_optim.nesterov(triton_optim.Lion), "momentum", "nesterov_momentum"),
        (triton_optim.clip_update(triton_optim.AdamW), "threshold", "clip_threshold"),
    ],
)
def test_a_wrappers_hyperparameter_without_what_is_before_it(cls, name, meant):
    with pytest.raises(TypeError, match=f"Did you mean {meant}?"):
        cls([matrix()], **{name: 0.5})


@pytest.mark.parametrize(("name", "value"), [("backend", "x"), ("amp", "fused"), ("max_grad_norm", 1e-9)])
def test_an_option_of_the_whole_optimizer_in_an_edited_group(name, value):
    p = matrix()
    optimizer = triton_optim.AdamW([p], backend="eager")
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0][name] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=f"AdamW has {name}=.*Give it to the constructor"):
            optimizer.step()
    assert torch.equal(p, before)
    del optimizer.param_groups[0][name]
    optimizer.step()


# Parameters and closures

MODEL = Linear(3, 3)
PARAMS = {
    "a method": (MODEL.parameters, "Call it."),
    "a model": (MODEL, "Give a list"),
    "None": (None, "Give a list"),
}


@pytest.mark.parametrize("cls", [triton_optim.AdamW, triton_optim.LBFGS])
@pytest.mark.parametrize(("params", "fix"), PARAMS.values(), ids=PARAMS)
def test_params_that_are_none(cls, params, fix):
    for given in (params, [{"params": params}]):
        with pytest.raises(TypeError, match="which is not iterable") as error:
            cls(given)
        explains(error, f"{params!r:.80}", fix)


@pytest.mark.parametrize("cls", [triton_optim.AdamW, triton_optim.LBFGS])
def test_a_group_whose_params_are_misspelt(cls):
    with pytest.raises(KeyError) as error:
        cls([{"param": [matrix()]}])
    explains(error, "'params'", "['param']")


@pytest.mark.parametrize("cls", [triton_optim.AdamW, triton_optim.LBFGS])
def test_a_loss_in_place_of_a_closure(cls):
    loss = MODEL(torch.ones(3)).sum()
    with pytest.raises(TypeError) as error:
        cls(MODEL.parameters()).step(loss)
    explains(error, "closure", f"{loss!r:.80}")


# States of another optimizer


@rows(*(case for case in CASES if case.name in ("AdamW", "Lion", "SGD", "Muon", "Adadelta")))
def test_what_another_optimizer_keeps_is_refused(case, device):
    """Wherever that keeps a tensor that this one does not, whatever else they share."""
    own = {*case.ours.declared, *case.ours.kept_names}
    others = [cls for cls in OPTIMIZERS.values() if hasattr(cls, "declared") and not {*cls.declared} <= own]
    assert len(others) > 10
    p = case.parameters(device)[0]
    optimizer = case.ours([p])
    for cls in others:
        saved = optimizer.state_dict()
        saved["state"] = {0: {name: torch.zeros_like(p) for name in {*own, *cls.declared}}}
        with pytest.raises(ValueError, match=f"{case.name} keeps .*: this state dict is of another optimizer"):
            optimizer.load_state_dict(saved)


def test_lion_refuses_adamws():
    p = matrix()
    p.grad = torch.ones_like(p)
    theirs = torch.optim.AdamW([p])
    theirs.step()
    lion = triton_optim.Lion([p])
    with pytest.raises(ValueError, match="this state dict is of another optimizer"), Unchanged(lion):
        lion.load_state_dict(theirs.state_dict())


def test_a_state_of_the_users_is_kept_and_what_a_wrapper_added_is_no_reason():
    p = matrix()
    p.grad = torch.ones_like(p)
    wrapped = triton_optim.lookahead(triton_optim.AdamW)([p], backend="eager")
    wrapped.step()
    wrapped.state[p]["mine"] = 5
    optimizer = triton_optim.AdamW([p], backend="eager")
    optimizer.load_state_dict(wrapped.state_dict())
    assert optimizer.state[p]["mine"] == 5


# Words


def test_names_of_dtypes_are_among_what_is_offered():
    for name, extra in (("state_dtype", {}), ("ema_dtype", {"ema_decay": 0.9})):
        with pytest.raises(ValueError, match=f"Invalid {name}: 'bf16'") as error:
            triton_optim.AdamW([matrix()], **{name: "bf16"}, **extra)
        explains(error, '"bfloat16"', '"float32"')
