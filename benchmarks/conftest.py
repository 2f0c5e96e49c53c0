"""What every benchmark module shares: where it runs, how long it waits for others, and where its answers go.

pytest benchmarks                      # measure and print
pytest benchmarks --results DIR        # and write one JSON file a module
"""

import os
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # read by Triton when a kernel is defined; the tests, which may run this, set it

import torch

HAS_GPU = torch.cuda.is_available() or torch.xpu.is_available()
REHEARSES = os.environ.get("TRITON_OPTIM_REHEARSAL") == "1"  # set by gpu_session.py
if REHEARSES:
    import rehearsal

    rehearsal.begin()

import pytest  # noqa: E402

from triton_optim.backends.triton import stub_driver  # noqa: E402
from triton_optim.bench.measure import Measurement  # noqa: E402
from triton_optim.bench.records import Record, write_records  # noqa: E402
from triton_optim.registry import rule_optimizers  # noqa: E402

# Every optimizer of which an element needs nothing but its own gradient.
ELEMENTWISE = [
    cls.__name__
    for cls in rule_optimizers().values()
    if cls.takes_dense_gradients and not any(variant.prologue for variant in cls.variants)
]
RECORDS = pytest.StashKey[list[Record]]()
LONGEST_SECONDS = 3600  # a test waits for a quiet machine


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("triton-optim benchmarks")
    group.addoption("--results", type=Path, help="folder for one JSON file a module; nothing is written without it")
    group.addoption(
        "--patience",
        type=float,
        default=300.0,
        help="seconds a measurement may wait for other programs and repeat what they disturbed (default 300)",
    )
    group.addoption("--against", type=Path, metavar="CHECKOUT", help="another checkout, timed beside this one")
    group.addoption("--runs", type=int, default=5, help="fresh processes of a cold start (default 5)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []
    # Warnings are errors, so that nothing measured has fallen back to another backend; these are not ours.
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:torch")
    config.addinivalue_line("filterwarnings", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning")
    if REHEARSES:
        config.addinivalue_line("filterwarnings", "ignore:CUDA is not available, disabling CUDA profiling:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(LONGEST_SECONDS))
        if item.get_closest_marker("gpu") and not (HAS_GPU or REHEARSES):
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch sees none"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if HAS_GPU else torch.device("cpu")


@pytest.fixture
def triton_device(device: torch.device) -> torch.device:
    """Where Triton steps run: the GPU, or the CPU with a driver that launches nothing."""
    if not HAS_GPU and stub_driver.installed() is None:
        stub_driver.install("sm_90")
    return device


@pytest.fixture(scope="session")
def patience(request: pytest.FixtureRequest) -> float:
    return request.config.getoption("patience")


@pytest.fixture(scope="session")
def against(request: pytest.FixtureRequest) -> Path | None:
    return request.config.getoption("against")


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("runs")


@pytest.fixture
def answer(request: pytest.FixtureRequest, device: torch.device) -> Callable[..., None]:
    """``answer(case, text, figures, value=, target=, measurement=)`` records, writes and prints what was found."""
    question = request.path.stem.removeprefix("test_")

    def answer(
        case: str,
        text: str,
        figures: dict,
        *,
        value: float | None = None,
        target: float | None = None,
        measurement: Measurement | None = None,
    ) -> None:
        record = Record(question, case, text, figures, value, target, measurement)
        records = request.config.stash[RECORDS]
        records.append(record)
        if folder := request.config.getoption("results"):  # now: a run that is cut off counts
            write_records(folder, [r for r in records if r.question == question], device)
        if "benchmark" in request.fixturenames:
            request.getfixturevalue("benchmark").extra_info.update(figures, target=target, met=record.met)

    return answer


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    records = config.stash[RECORDS]
    if not records:
        return
    terminalreporter.section("answers")
    for record in records:
        terminalreporter.write_line(f"{record.question}: {record.line()}")
