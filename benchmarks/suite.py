"""Does the test suite pass with other releases of torch?

The whole suite with each of these Python interpreters, of environments that have this package installed
(``pip install -e ".[demo,test]"``): ``python benchmarks/suite.py --python a/bin/python,b/bin/python --results
benchmarks/results``. No GPU is needed, and each takes about 20 minutes of two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from launch import tested

from triton_optim.bench.records import write_records

SAY = "import torch, triton; print(f'torch {torch.__version__}, Triton {triton.__version__}')"
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_OPTIM_CACHE_DIR")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="interpreters, with commas (default: this one)")
    parser.add_argument("--results", type=Path, help="folder for suite.json; nothing is written without it")
    arguments = parser.parse_args()
    records = []
    for python in arguments.python.split(","):
        case = subprocess.run([python, "-c", SAY], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {name: str(Path(folder) / name) for name in CACHES}
            records.append(tested("suite", case, [python], environment, Path(folder)))
        print(records[-1].line(), flush=True)
        if arguments.results:
            write_records(arguments.results, records, torch.device("cpu"))
    sys.exit(any(record.value for record in records))


if __name__ == "__main__":
    main()
