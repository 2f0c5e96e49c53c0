"""How long does ``import triton_optim`` take beyond ``import torch``?"""

import json
import os
import subprocess
import sys
from collections.abc import Callable

from triton_optim.bench.measure import measure_processes

TARGET = 0.3
SCRIPT = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
import triton_optim
end = time.perf_counter()
import json
print(json.dumps({"torch s": between - start, "triton_optim s": end - between}))
"""


def test_import(benchmark: Callable, answer: Callable, patience: float) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def fresh_process() -> dict:
        command = [sys.executable, "-c", SCRIPT]
        return json.loads(subprocess.run(command, env=inherited, capture_output=True, text=True, check=True).stdout)

    fresh_process()  # writes the bytecode
    m = measure_processes(fresh_process, patience, runs=9)
    seconds = m.median("triton_optim s")
    text = f"{seconds:.3f} s beyond import torch ({m.median('torch s'):.2f} s)"
    answer("import", text, {"triton_optim s": seconds}, value=seconds, target=TARGET, measurement=m)
    # The table shows the whole process, torch included.
    benchmark.pedantic(fresh_process, rounds=1)
