"""Options are seen: signatures, docstrings and type checkers know them all, and an unknown one names the nearest."""

import inspect
import pydoc
import subprocess
import sys
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from table import CASES, Case, each_case, rows
from torch.nn import Parameter

import triton_optim
from triton_optim.dispatch import BACKENDS
from triton_optim.options import DTYPES, LINES, OPTIONS, Options
from triton_optim.precision.codecs import PARAM_PRECISIONS, STATE_CODES

SGD = triton_optim.SGD.variants[0].rule


class Undocumented(triton_optim.RuleOptimizer):
    rule = SGD

    def __init__(self, params, lr=0.1, **options):  # type: ignore[no-untyped-def]
        super().__init__(params, {"lr": lr}, **options)


class Documented(Undocumented):
    """A line of the user's."""


class Inherits(triton_optim.AdamW):
    def __init__(self, params, lr=3e-4, **options):  # type: ignore[no-untyped-def]
        super().__init__(params, lr, **options)


class Fixed(triton_optim.RuleOptimizer):
    """Takes no options."""

    rule = SGD

    def __init__(self, params, seed=1):  # type: ignore[no-untyped-def]
        super().__init__(params, {"lr": 0.1}, seed=seed)


OWN = (Undocumented, Documented, Inherits)
ALL = [*(case.ours for case in CASES), triton_optim.RuleOptimizer, *OWN]
each_class = pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)


def parameters() -> list[Parameter]:
    return [Parameter(torch.zeros(2, 2))]


def shown(cls: type) -> str:
    return pydoc.render_doc(cls, renderer=pydoc.plaintext)


# What is written of an option, in three places


def test_types_defaults_and_lines_are_of_the_same_options() -> None:
    assert list(OPTIONS) == [line.partition(": ")[0] for line in LINES]
    assert OPTIONS.keys() == typing.get_type_hints(Options).keys()
    assert not Options.__required_keys__


def test_types_have_the_values_that_there_are() -> None:
    types = typing.get_type_hints(Options)
    words = {
        name: {word for part in (hint, *typing.get_args(hint)) for word in typing.get_args(part) if type(word) is str}
        for name, hint in types.items()
    }
    assert {name: found for name, found in words.items() if found} == {
        "backend": {"auto", *BACKENDS},
        "param_precision": set(PARAM_PRECISIONS),
        "state_dtype": {*STATE_CODES, *DTYPES},
        "ema_dtype": {*DTYPES},
        "amp": {"fused"},
        "offload": {"cpu"},
    }


# Signatures


@each_class
def test_the_signature_has_every_option_with_its_default(cls: type) -> None:
    found = inspect.signature(cls).parameters
    written = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    for name, default in OPTIONS.items():
        assert found[name].default == default, name
        assert found[name].kind is inspect.Parameter.KEYWORD_ONLY or name in written
    assert all(argument.kind is not inspect.Parameter.VAR_KEYWORD for argument in found.values())
    assert [name for name in found if name not in OPTIONS] == [
        name for name in written if name not in {"self", "options", *OPTIONS}
    ]


@each_case
def test_type_checkers_are_told_what_the_signature_shows(case: Case) -> None:
    hints = typing.get_type_hints(case.ours.__init__)
    (rest,) = typing.get_args(hints.pop("options"))
    unpacked = typing.get_type_hints(rest)
    assert not unpacked.keys() & hints.keys()  # which they refuse
    found = inspect.signature(case.ours).parameters
    assert found.keys() == (unpacked.keys() | hints.keys()) - {"return"}
    types = typing.get_type_hints(Options)
    assert {name: types[name] for name in OPTIONS} == {name: {**hints, **unpacked}[name] for name in OPTIONS}


@rows(*(case for case in CASES if not case.sparse))
def test_an_option_given_as_it_is_by_default_changes_nothing(case: Case) -> None:
    plain, given = case.ours(parameters()), case.ours(parameters(), **OPTIONS)
    for a, b in zip(plain.param_groups, given.param_groups, strict=True):
        assert {**a, "params": None} == {**b, "params": None}
    for name in ("backend", "amp", "max_grad_norm"):
        assert getattr(given, name) == getattr(plain, name) == OPTIONS[name]


# What differs from the defaults, for every class to take.
CHOSEN: dict[str, Any] = {
    "foreach": False,
    "maximize": True,
    "capturable": True,
    "fused": False,
    "seed": 3,
    "ema_decay": 0.5,
    "ema_dtype": torch.float32,
    "ema_warmup": True,
    "offload": "cpu",
    "amp": "fused",
    "max_grad_norm": 2.0,
    "backend": "eager",
}


@pytest.mark.parametrize("cls", [*(case.ours for case in CASES), *OWN], ids=lambda cls: cls.__name__)
def test_every_option_arrives(cls: type) -> None:
    for name, value in CHOSEN.items():
        optimizer = cls(parameters(), **{name: value})
        group = optimizer.param_groups[0]
        assert (group[name] if name in group else getattr(optimizer, name)) == value, name
    assert cls(parameters(), backend="eager", differentiable=True).param_groups[0]["differentiable"]


def test_a_constructor_that_takes_no_options_shows_none() -> None:
    assert list(inspect.signature(Fixed).parameters) == ["params", "seed"]
    assert Fixed.__doc__ == "Takes no options."
    for cls in (triton_optim.LBFGS, triton_optim.NonlinearCG):
        assert inspect.signature(cls).parameters.keys() & OPTIONS.keys() == {"maximize"}
        assert not any(line in shown(cls) for line in LINES if not line.startswith("maximize: "))


# Docstrings


@pytest.mark.parametrize("cls", [*(case.ours for case in CASES), *OWN], ids=lambda cls: cls.__name__)
def test_help_has_a_line_for_each_option(cls: type) -> None:
    lines = [line.removeprefix(" |").strip() for line in shown(cls).splitlines()]
    assert [line for line in lines if line in LINES] == LINES
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{cls.__name__}("))
    head = " ".join(lines[start : lines.index("", start)])  # one line, of an argument each from Python 3.14 on
    assert all(f"{name}: " in head or f"{name}=" in head for name in OPTIONS), head
    assert all(len(line) < 117 for line in LINES)


def test_lines_follow_what_the_class_says() -> None:
    assert Documented.__doc__ is not None
    assert Documented.__doc__.startswith("A line of the user's.\n\nOptions")
    assert (Inherits.__doc__, Undocumented.__doc__) == (
        triton_optim.AdamW.__doc__,
        f"{inspect.getdoc(triton_optim.RuleOptimizer)}\n\n{Documented.__doc__.partition(chr(10) * 2)[2]}",
    )


def test_the_base_leaves_the_words_to_the_options() -> None:
    assert not any(line in shown(triton_optim.RuleOptimizer) for line in LINES)
    assert all(line in shown(Options) for line in LINES)


# As by python -OO, but not for torch, whose bytecode of that kind would take ten seconds to make.
WITHOUT_DOCSTRINGS = """
import inspect, torch
from importlib.machinery import SourceFileLoader

def get_code(loader, name):
    path = loader.get_filename(name)
    return compile(loader.get_data(path), path, "exec", dont_inherit=True, optimize=2)

SourceFileLoader.get_code = get_code
import triton_optim
from triton_optim.options import OPTIONS
assert triton_optim.AdamW.__doc__ is None
assert OPTIONS.keys() <= inspect.signature(triton_optim.AdamW).parameters.keys()
p = torch.nn.Parameter(torch.ones(2))
optimizer = triton_optim.AdamW([p], backend="eager", max_grad_norm=1.0)
p.sum().backward()
optimizer.step()
try:
    triton_optim.AdamW([p], state_dtyp="int8")
except TypeError as error:
    print(error)
"""


def test_without_docstrings_all_else_works() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_DOCSTRINGS], capture_output=True, text=True, check=True)
    assert "Did you mean state_dtype?" in done.stdout


# Errors


@pytest.mark.parametrize("cls", [*(case.ours for case in CASES), *OWN], ids=lambda cls: cls.__name__)
def test_a_misspelt_option_names_the_nearest(cls: type) -> None:
    near = {"params", "a", "b", "d", "r", "t0", "beta3", "bias_correction1", "bias_correction2"}  # to others
    for name in inspect.signature(cls).parameters.keys() - near:
        for wrong in (f"{name}s", name[:-1], name.title()):
            if wrong in inspect.signature(cls).parameters or len(wrong) == 1:
                continue
            with pytest.raises(TypeError) as error:
                cls(parameters(), **{wrong: 7})
            said = str(error.value)
            assert said.startswith(f"{cls.__name__} got an unexpected keyword argument: {wrong}=7. Did you mean "), said
            assert said.endswith(f"{name}?"), said


@each_class
def test_an_option_like_no_other_is_told_what_there_is(cls: type) -> None:
    arguments: dict[str, Any] = {"defaults": {}} if cls is triton_optim.RuleOptimizer else {}
    with pytest.raises(TypeError) as error:
        cls(parameters(), **arguments, xyzzy="int8")
    said = str(error.value)
    assert said.startswith(f"{cls.__name__} got an unexpected keyword argument: xyzzy='int8'. It takes params, ")
    assert said.endswith(", ".join([*OPTIONS][-9:]) + ".")


def test_a_constructor_that_misspells_an_option_itself_is_told_so() -> None:
    class Misspells(Fixed):
        def __init__(self, params: Any) -> None:
            super(Fixed, self).__init__(params, {"lr": 0.1}, sed=1)  # type: ignore[call-arg]

    with pytest.raises(TypeError, match=r"sed=1\. Did you mean seed\?"):
        Misspells(parameters())


def test_the_first_unknown_option_is_named_whatever_the_others() -> None:
    with pytest.raises(TypeError, match="state_dtyp="):
        triton_optim.AdamW(parameters(), backend="tirton", state_dtyp=None, sed=1)


# Type checkers

CHECKED = """
from typing import Any

import triton_optim
from typing_extensions import Unpack


class Own(triton_optim.RuleOptimizer):
    def __init__(self, params: Any, lr: float = 0.1, **options: Unpack[triton_optim.Options]) -> None:
        super().__init__(params, {"lr": lr}, **options)


triton_optim.AdamW([], state_dtype="int8", backend="eager", foreach=None, max_grad_norm=1)
triton_optim.ASGD([], foreach=True, ema_decay=0.9)
Own([], ema_decay=0.9, maximize=True)
triton_optim.AdamW([], state_dtyp="int8")
triton_optim.Adagrad([], maximise=True)
triton_optim.ASGD([], forech=True)
triton_optim.SparseAdam([], fussed=True)
Own([], ema_deca=0.9)
triton_optim.Lion([], backend="tirton")
triton_optim.Muon([], seed="3")
"""
# What torch's types are is not the question, and reading them takes half a minute.
SETTINGS = """
[mypy]
strict = true
python_version = 3.10
[mypy-torch.*]
follow_imports = skip
[mypy-triton_optim.*]
ignore_errors = true
"""


def test_mypy_knows_the_options(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed, which is asked here")
    (tmp_path / "checked.py").write_text(CHECKED.strip())
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "none", "checked.py"]
    sources = str(Path(triton_optim.__file__).parents[1])
    done = subprocess.run(command, cwd=tmp_path, env={"MYPYPATH": sources}, capture_output=True, text=True)
    errors = [line.partition(" error: ")[2] for line in done.stdout.splitlines() if " error: " in line]
    expected = ["state_dtype", "maximize", "foreach", "fused", "ema_decay", "'tirton'", "seed"]
    assert len(errors) == len(expected), done.stdout + done.stderr
    assert all(word in error for word, error in zip(expected, errors, strict=True)), errors


@pytest.mark.parametrize(("name", "value"), [("backend", "eager"), ("amp", "fused"), ("max_grad_norm", 1.0)])
def test_a_group_has_no_option_of_the_whole_optimizer(name: str, value: Any) -> None:
    group = {"params": [Parameter(torch.zeros(2))], name: value}
    says = f"AdamW has {name}=.*is of the whole optimizer. Give it to the constructor: AdamW.groups, {name}="
    with pytest.raises(ValueError, match=says):
        triton_optim.AdamW([group])
    optimizer = triton_optim.AdamW([Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=says):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_a_group_with_a_key_that_is_nearly_an_option() -> None:
    with pytest.warns(RuntimeWarning, match="has statedtype='int8', which nothing reads. If state_dtype was meant"):
        triton_optim.AdamW([{"params": [Parameter(torch.zeros(2))], "statedtype": "int8"}])


def test_a_group_keeps_what_is_the_users() -> None:
    own = {"name": "decoder", "initial_lr": 0.1, "lr_scale": 0.5, "max_lr": 1.0, "lr_mult": 1, "layer": 3, "wd_mult": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = triton_optim.AdamW([{"params": [Parameter(torch.zeros(2))], **own}])
    assert optimizer.param_groups[0].items() >= own.items()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"maximize": "no"}, "Invalid maximize: 'no', which is text. Give True or False"),
        ({"amsgrad": "False"}, "Invalid amsgrad: 'False', which is text"),
        ({"fused": "true"}, "Invalid fused: 'true', which is text"),
        ({"seed": "7"}, "Invalid seed: '7', of type str. It must be an int"),
        ({"seed": 1.5}, "Invalid seed: 1.5, of type float"),
        ({"max_grad_norm": True}, "Invalid max_grad_norm: True. It must be a positive number"),
        ({"ema_dtype": "int8"}, "Invalid ema_dtype: 'int8'. Use None"),
    ],
)
def test_an_option_of_another_kind_is_refused(options: dict[str, Any], says: str) -> None:
    parameter = Parameter(torch.zeros(2))
    with pytest.raises((TypeError, ValueError), match=says):
        triton_optim.AdamW([parameter], **options)
    (name, value), *_ = options.items()
    optimizer = triton_optim.AdamW([parameter])
    with pytest.raises((TypeError, ValueError), match=says):  # noqa: PT012
        if name == "max_grad_norm":
            optimizer.max_grad_norm = value
        parameter.grad, optimizer.param_groups[0][name] = torch.ones(2), value
        optimizer.step()
    assert parameter.eq(0).all()


@pytest.mark.parametrize("seed", [3, -1, 2**70, True, torch.tensor(3)])
def test_a_seed_is_an_int(seed: Any) -> None:
    parameter = Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = triton_optim.SGD([parameter], 1e-3, param_precision="stochastic", seed=seed)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameter.ne(0).all()
