"""Checkouts that are not installed."""

from pathlib import Path


def importable(checkout: Path, folder: Path) -> Path:
    """Make `folder` one to import a checkout from, and return it.

    A checkout has triton_optim.kernels beside the package. With another checkout installed editably, Python would find
    that one's kernels.
    """
    package = folder / "triton_optim"
    package.mkdir(parents=True)
    for path in (checkout / "triton_optim").iterdir():
        if path.name not in ("kernels", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(checkout / "kernels")
    return folder
