"""What a measurement leaves behind: answers, samples, and where and with what they were measured."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..util.files import write_json
from ..util.provenance import provenance
from .measure import Measurement
from .peers import PEERS

KEPT = 101  # samples of a side and round that a file holds


@dataclass
class Record:
    """One answer: what was measured, what was claimed of it, and the samples."""

    question: str
    case: str
    text: str  # the answer in words
    figures: dict[str, Any]
    value: float | None = None  # what the target is about
    target: float | None = None
    measurement: Measurement | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        return None if self.value is None or self.target is None else self.value <= self.target

    def line(self) -> str:
        """The answer on one line."""
        verdict = "" if self.met is None else f"; target <= {self.target:g}: {'met' if self.met else 'NOT MET'}"
        quality = f" [{self.measurement.quality()}]" if self.measurement else ""
        return f"{self.case}: {self.text}{verdict}{quality}"


def write_records(folder: Path, records: Sequence[Record], device: torch.device) -> list[Path]:
    """One JSON file a question, each with what is needed to run it again."""
    paths = []
    for question in dict.fromkeys(record.question for record in records):
        path = folder / f"{question}.json"
        write_file(path, question, [record for record in records if record.question == question], device)
        paths.append(path)
    return paths


def write_file(path: Path, question: str, records: Sequence[Record], device: torch.device, **more: Any) -> None:
    """One JSON file, in a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": command(), "source": source(), **provenance(device, DISTRIBUTIONS), **more}
    own = [asdict(record) | {"met": record.met} for record in records]
    for record in own:
        for one in (record["measurement"] or {}).get("rounds", ()):
            one |= {side: spread(samples) for side, samples in one.items()}
    write_json(path, {"question": question, **about, "records": own})


def with_others(path: Path, records: Sequence[Record]) -> tuple[list[Record], dict[str, Any]]:
    """These records, and those of other cases that a file has; and ``earlier``, for :func:`write_file`: of when these
    others are.
    """
    if not path.exists():
        return list(records), {}
    found, new = json.loads(path.read_text()), {record.case: record for record in records}
    fields = [{k: v for k, v in one.items() if k != "met"} for one in found["records"]]
    kept = {one["case"]: Record(**one) for one in fields if one["case"] not in new}
    whole = {name: found[name] for name in ("command", "source", "date")}
    earlier = {case: found.get("earlier", {}).get(case, whole) for case in kept}
    order = dict.fromkeys([*(one["case"] for one in fields), *new])
    return [new.get(case) or kept[case] for case in order], {"earlier": earlier} if earlier else {}


def spread(samples: list[float]) -> list[float]:
    """All samples, or, of more than `KEPT`, as many that divide them evenly: the least, the median and the most among
    them.

    Example:
        >>> from triton_optim.bench.records import spread
        >>> found = spread([float(i) for i in range(1001)])
        >>> len(found), found[0], found[50], found[-1]
        (101, 0.0, 500.0, 1000.0)
    """
    if len(samples) <= KEPT:
        return samples
    ranked = sorted(samples)
    return [ranked[round(i * (len(ranked) - 1) / (KEPT - 1))] for i in range(KEPT)]


DISTRIBUTIONS = sorted({peer.distribution for peer in PEERS.values()} - {"torch"})


def command() -> str:
    """What was typed, without the folders of this machine."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


def source() -> str | None:
    """The commit of this package, with ``-dirty`` where files differ from it; None outside of its own checkout."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    here = Path(__file__).parent
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True, check=True)
        return subprocess.run(describe, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
