"""The floors of the package: imports run one way, down, those for types too, in no circle; no room is too long."""

import ast
from pathlib import Path

import pytest

import triton_optim
from triton_optim import kernels

PACKAGE, KERNELS = Path(triton_optim.__file__).parent, Path(next(iter(kernels.__path__)))
# From the ground up. What stands on one floor may import its own and those below.
FLOORS = (
    "kernels",
    "dispatch",
    "util",
    "options",
    "spec",
    "precision",
    "buckets",
    "backends",
    "engine",
    "core",
    "wrappers",
    "optimizers",
    "training",
    "",  # the package itself: what users import
    "registry",
    "integrations",
    "catalog",
    "bench",
    "audit",
    "race",
    "cli",
    "__main__",
)
TOOLS = ("audit", "bench", "race", "cli")
BACKENDS = ("triton", "cpp", "compiled", "eager")


def modules() -> dict[str, Path]:
    """Every module by its dotted name below the package's."""
    found = {}
    for root, prefix in ((PACKAGE, ()), (KERNELS, ("kernels",))):
        for file in root.rglob("*.py"):
            parts = (*prefix, *file.relative_to(root).with_suffix("").parts)
            found[".".join(parts).removesuffix("__init__").rstrip(".")] = file
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """What a module imports of the package, anywhere in it."""
    file = MODULES[name]
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [part for part in package[: len(package) - node.level + 1] if part]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                inner = ".".join((*base, alias.name))
                found.add(inner if inner in MODULES else ".".join(base))
        elif isinstance(node, (ast.ImportFrom, ast.Import)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {n.removeprefix("triton_optim").lstrip(".") for n in names if n.split(".")[0] == "triton_optim"}
    return found


IMPORTS = {name: imports(name) for name in MODULES}


def floor(name: str) -> int:
    return FLOORS.index(name.partition(".")[0])


def test_every_module_stands_on_a_floor() -> None:
    assert {name.partition(".")[0] for name in MODULES} == set(FLOORS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_down(name: str) -> None:
    assert [other for other in sorted(IMPORTS[name]) if floor(other) > floor(name)] == []


def test_there_is_no_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in IMPORTS[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_a_backend_knows_no_other_and_no_optimizer() -> None:
    for name in MODULES:
        kind = name.split(".")[1:2]
        if name.startswith("backends.") and kind[0] in BACKENDS:
            others = {f"backends.{other}" for other in BACKENDS if other != kind[0]} | {"kernels.rules"}
            assert not [i for i in IMPORTS[name] if any(i.startswith(other) for other in others)], name


def test_modules_and_classes_are_read_in_one_go() -> None:
    """About 350 lines and 250: what grows longer has more than one subject."""
    long = {}
    for name, path in MODULES.items():
        text = path.read_text()
        if text.count("\n") > 360:
            long[name] = text.count("\n")
        classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
        long |= {f"{name}.{c.name}": n for c in classes if (n := (c.end_lineno or 0) - c.lineno + 1) > 255}
    assert long == {}


def test_nothing_needs_the_tools() -> None:
    for name in MODULES:
        if name.partition(".")[0] not in (*TOOLS, "__main__"):
            assert not [i for i in IMPORTS[name] if i.partition(".")[0] in TOOLS], name
