"""What the options of `triton-optim audit` choose from."""

from pathlib import Path

MODEL, RULES, KEPT = "llama3_8b", "adamw", "fp32,bf16 stochastic,bf16 int8"  # that are predicted by default


def default_results() -> Path:
    """The results of the checkout that this package lies in."""
    return Path(__file__).parents[2] / "benchmarks" / "results"


def chosen(option: str, given: str | None, known: list[str]) -> list[str]:
    """The names that an option gives, comma-separated, or all `known` ones."""
    names = known if given is None else [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {given}: the audit knows no {name!r}. Choose from {', '.join(known)}.")
    return names
