"""Write what is shown of the committed results: ``python benchmarks/report.py``.

README gets five lines, `docs/performance.md` a line a question, what was missed and two pictures,
`benchmarks/RESULTS.md` every case; the pictures lie beside the results. A test compares all of them with the results.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from triton_optim.bench.picture import Point, digest, save_bars, save_lines

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
# What is between these is written, and what it is called.
IN_SHORT, HEADLINES_OF_ALL = "results in short", "results"


class Headline(NamedTuple):
    """A line of a table: what stands there, and the case that it shows."""

    label: str
    question: str
    case: str


RESNET50 = "resnet50 (161 tensors)"
HEADLINES = (
    Headline("AdamW, ResNet-50", "cpp_step", f"AdamW, {RESNET50}"),
    Headline("AdamW, 64M parameters in 16 tensors", "cpp_step", "AdamW, 64M16 (16 tensors)"),
    Headline("AdamW, 1,000 tensors of 1,000", "cpp_step", "AdamW, 1000x1k (1000 tensors)"),
    Headline("AdamW, GPT-2", "models", "AdamW, gpt2 (148 tensors)"),
    Headline("AdamW, ResNet-50, bfloat16", "backends", f"AdamW, {RESNET50}, bfloat16"),
    Headline("SGD, which torch's fused does as well, ResNet-50", "cpp_step", f"SGD, {RESNET50}"),
    Headline("RMSprop, which torch has no fused kernel for, ResNet-50", "cpp_step", f"RMSprop, {RESNET50}"),
    Headline("Muon, GPT-2's matrices", "matrix_step", "Muon, gpt2 (48 matrices)"),
    Headline(
        "AdamW, 64M, bf16 and bf16 states, with stochastic rounding",
        "codec_step",
        "AdamW, 64M16 (16 tensors), bf16 stochastic, bf16 states",
    ),
    Headline("AdamW, 64M, int8 states", "codec_step", "AdamW, 64M16 (16 tensors), fp32, int8 states"),
    Headline("Loss with int8 states beside float32's", "state_codecs", "AdamW, states in int8, character model of 1M"),
    Headline("Clip, AdamW and average, ResNet-50", "whole_step", f"Clip, AdamW and average, {RESNET50}, cpu"),
    Headline("Other packages, AdamW, ResNet-50", "peers", f"AdamW, {RESNET50}"),
    Headline("Other packages, AdamW in int8 states, ResNet-50", "peers", f"AdamW, {RESNET50}, state_dtype=int8"),
    Headline("Host time of a Triton step, 1,000 tensors", "host_time", "AdamW, 1000 tensors, new gradients: ms"),
    Headline("The same, one-rank DTensor", "host_time", "AdamW, 1000 tensors, new gradients: one-rank DTensor"),
    Headline("A step of 10 small tensors on a CPU", "small_steps", "AdamW, MLP of 10 tensors, 1 thread, new gradients"),
    Headline("Kernels a Triton step launches", "launches", f"AdamW, {RESNET50}, 2 groups, 0 misaligned"),
    Headline("Temporaries of a step, ResNet-50", "memory", f"AdamW, {RESNET50}, ours, cpu"),
    Headline("First step, 1,000 tensors, cold", "cold_start", "AdamW, 1000x1k (1000 tensors), cpu, empty caches"),
    Headline(
        "First step of 10 tensors, cold, after a backward pass",
        "cold_start",
        "AdamW, a first training step, empty caches",
    ),
    Headline("The demo's whole training", "demo_training", "The demo's whole training, filled caches"),
    Headline("Import", "import", "import"),
    Headline("Faults put into the code that the tests notice", "mutants", "all"),
    Headline(
        "GPU: share of copy bandwidth, 1e9 parameters", "gpu_step", "AdamW, 100x10M (100 tensors), time over the floor"
    ),
)
# README's, by what stands there.
FOR_USERS = {
    "AdamW, ResNet-50": "A step of AdamW, ResNet-50",
    "RMSprop, which torch has no fused kernel for, ResNet-50": "RMSprop, which torch has no fused kernel for",
    "Clip, AdamW and average, ResNet-50": "Clipping, AdamW and averaging",
    "AdamW, 64M, bf16 and bf16 states, with stochastic rounding": "AdamW, 64M weights and states in bfloat16",
    "A step of 10 small tensors on a CPU": "AdamW, 10 small tensors, one thread",
}
NOT_MEASURED = "not measured yet"


@cache
def results() -> dict[str, dict[str, Any]]:
    """The committed results by question."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def machine(result: dict[str, Any]) -> str:
    """With what it was measured."""
    found, versions = result["machine"], result["versions"]
    return (
        f"{found['processor']}, {found['cores']} cores, {found['device']}, torch {versions['torch']}, "
        f"Triton {versions['triton']}"
    )


def place(result: dict[str, Any]) -> str:
    """With what it was measured, when, and of which commit."""
    earlier = len(result.get("earlier", ()))
    some = f"; {earlier} of {len(result['records'])} cases of earlier days" if earlier else ""
    return f"{machine(result)}, {result['date'][:10]}, commit {result['source']}{some}"


def in_short(record: dict[str, Any]) -> str:
    """Our time and its ratio to the fastest peer's, where the text has the times of all."""
    times, _, ratio = record["text"].rpartition("; ")
    return (
        f"{times.partition(', ')[0]}; {ratio}"
        if times.startswith("ours ") and "peer" in record["figures"]
        else record["text"]
    )


def verdict(record: dict[str, Any]) -> str:
    """The target and whether it is met."""
    met = {True: "met", False: "**not met**", None: ""}[record["met"]]
    return f"{record['target']:g} {met}" if record["met"] is not None else ""


def line(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def every_case() -> dict[tuple[str, str], dict[str, Any]]:
    """The records by question and case."""
    return {(question, r["case"]): r for question, result in results().items() for r in result["records"]}


def headlines_in_short() -> str:
    """README's block: what a user gains, and where it was measured."""
    shown = {h.label: h for h in HEADLINES if h.label in FOR_USERS}
    lines = [line("measured", "result"), "|---|---|"]
    for label, words in FOR_USERS.items():
        record = every_case().get(shown[label][1:])
        lines.append(line(words, in_short(record) if record else NOT_MEASURED))
    machines = dict.fromkeys(machine(results()[h.question]) for h in shown.values() if h.question in results())
    where = "; ".join(machines)
    return "\n".join(
        [*lines, "", f"On {where}; a ratio below 1 is faster.", "[Performance](docs/performance.md) has all."]
    )


def headlines() -> str:
    """The block of the page on performance: a table, what was missed, pictures, and where it was measured."""
    cases = every_case()
    lines = [line("measured", "result", "target"), "|---|---|---|"]
    for label, question, case in HEADLINES:
        record = cases.get((question, case))
        lines.append(line(label, in_short(record), verdict(record)) if record else line(label, NOT_MEASURED, ""))
    for name in pictures():
        lines += ["", f"![{pictures()[name].title}](../benchmarks/results/{name}.svg)"]
        lines += ["", slower()] if name == "scaling" else []
    judged = [record for record in cases.values() if record["met"] is not None]
    missed = [record for record in judged if not record["met"]]
    lines += ["", f"{len(judged) - len(missed)} of {len(judged)} targets are met. Not met:", ""]
    lines += [f"- {record['case']}: {record['text']}; target {record['target']:g}" for record in missed] or ["- none"]
    lines += ["", "Each question, where it was measured, and the command:", ""]
    lines += [line("question", "machine, date and commit", "command"), "|---|---|---|"]
    lines += [line(name, place(result), f"`{result['command']}`") for name, result in results().items()]
    return "\n".join(lines)


def shown(path: Path, name: str, written: str) -> str:
    """A page with its block of that name brought up to date."""
    start, end = f"<!-- {name}: written by benchmarks/report.py -->", f"<!-- end of {name} -->"
    before, rest = path.read_text().split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{written}\n{end}{after}"


def pages() -> dict[Path, str]:
    """The pages that show results, as they should be."""
    return {
        README: shown(README, IN_SHORT, headlines_in_short()),
        PERFORMANCE: shown(PERFORMANCE, HEADLINES_OF_ALL, headlines()),
        BENCHMARKS / "RESULTS.md": all_results(),
    }


def question_of(name: str) -> str:
    """The first sentence of the module that measures it, which is the question."""
    path = next(path for stem in (f"test_{name}", name) if (path := BENCHMARKS / f"{stem}.py").exists())
    words = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(words.split("\n\n")[0].split())


def all_results() -> str:
    """`RESULTS.md`: a table for each question."""
    lines = [
        "# Results",
        "",
        "Written by `benchmarks/report.py` from `benchmarks/results/`, which has the samples.",
        "",
    ]
    for name, result in results().items():
        lines += [f"## {name}", "", question_of(name), "", f"{place(result)}", "", f"`{result['command']}`", ""]
        lines += [line("measured", "result", "target"), "|---|---|---|"]
        lines += [line(record["case"], record["text"], verdict(record)) for record in result["records"]]
        lines.append("")
        if name in pictures():
            lines += [f"![{pictures()[name].title}](results/{name}.svg)", ""]
    return "\n".join(lines)


class Picture(NamedTuple):
    """What is drawn of a question's results."""

    title: str
    data: Any
    save: Callable[[Path, Any, str], None]


def pictures() -> dict[str, Picture]:
    """The pictures of what was measured, by question."""
    drawn: dict[str, tuple[str, Callable[[], Any], Any]] = {
        "scaling": ("A step", lines_of_scaling, save_lines),
        "codec_step": ("AdamW on 64M parameters in each codec", bars_of_codecs, save_bars),
    }
    return {
        name: Picture(f"{title}, {results()[name]['machine']['processor']}", data(), save)
        for name, (title, data, save) in drawn.items()
        if name in results()
    }


def lines_of_scaling() -> dict[str, dict[str, list[Point]]]:
    """The points of each optimizer's lines."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for record in results()["scaling"]["records"]:
        found = record["figures"]
        count = f"{found['tensors']:,} tensor{'s' * (found['tensors'] > 1)}"
        points = panels.setdefault(found["optimizer"], {}).setdefault(count, [])
        points.append(Point(found["elements"], found["ours ms"], found[f"{found['peer']} ms"]))
    return panels


def bars_of_codecs() -> dict[str, dict[str, float]]:
    """The times of each codec's step."""
    codecs: dict[str, dict[str, float]] = {}
    for record in results()["codec_step"]["records"]:
        figures = record["figures"]
        if "ms" in figures:
            own = {"ours": figures["ms"]}
            fused = {f"torch-fused, {dtype}": figures[f"fused {dtype} ms"] for dtype in ("fp32", "bf16")}
            codecs[record["case"].partition("tensors), ")[2]] = own | fused
    return codecs


def slower() -> str:
    """Where its picture shows ours above torch's."""
    records = results()["scaling"]["records"]
    found = [f"{r['case']} ({r['figures']['ratio']:.2f} x)" for r in records if not r["met"]]
    return f"Slower than the fastest of torch's by over 5 % at {len(found)} of {len(records)} points" + (
        f": {'; '.join(found)}." if found else "."
    )


def out_of_step() -> list[str]:
    """The files that do not show the committed results."""
    stale = [path.name for path, text in pages().items() if not path.exists() or path.read_text() != text]
    for name, (title, data, _) in pictures().items():
        path = RESULTS / f"{name}.svg"
        if not path.exists() or digest(data, title) not in path.read_text():
            stale.append(path.name)
    return stale


def main() -> None:
    """Write what is out of step, and nothing else."""
    stale = out_of_step()
    for name, (title, data, save) in pictures().items():
        if f"{name}.svg" in stale:
            save(RESULTS / f"{name}.svg", data, title)
    for path, text in pages().items():
        path.write_text(text)
    print(f"written: {', '.join(stale) or 'nothing, all was in step'}")


if __name__ == "__main__":
    main()
