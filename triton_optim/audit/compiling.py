"""Compiles kernels for GPUs that need not be there, and reads what Triton and its tools say of them."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..backends.triton.tables import TRITON_DTYPES

_INSTRUCTION = 16  # bytes, on NVIDIA


class Resources(NamedTuple):
    """What a compiled kernel needs; see :class:`triton_optim.audit.measure.Measurement`."""

    registers: int
    scalar_registers: int | None
    spilled: int  # registers that the compiler says it spilled; NVIDIA's does not say
    stack_bytes: int
    shared_bytes: int


def compile_update(
    kernel: ModuleType,
    rule: Any,
    scalars: Any,
    parameter: torch.dtype,
    kept: dict[str, Any],
    target: GPUTarget,
    aligned: bool,
) -> Any:
    """Triton's compiled kernel of an update, specialised as the Triton backend does.

    Args:
        kernel: the module of the multi-tensor kernel.
        rule, scalars: the rule and the NamedTuple type of its scalars.
        parameter: the dtype of p.
        kept: how the roles are kept, and the launch options: of backends.triton.tables.kept_as.
        aligned: whether every address is a multiple of 16.
    """
    compute = TRITON_DTYPES[torch.float64 if parameter == torch.float64 else torch.float32]
    by_value = parameter != torch.float64  # as in most steps
    constants = {
        "RULE": rule,
        "SCALARS": scalars,
        "FIELDS": scalars._fields,
        **kept,
        "BY_VALUE": by_value,
        "COMPUTE": compute,
        "CONVERT": kernel.convert,
        "BLOCK": kernel.BLOCK,
        "ALIGNED": aligned,
        "SOURCE": "",
    }
    row = ("fp32",) * (1 + len(scalars._fields) + kept["AVERAGED"])
    tables = {"chunks": "*i32", "tensors": "*i64", "gradients": "*i64", "rows": row if by_value else f"*{compute}"}
    tables |= {
        "numbers": "*i32",
        "keys": "i32" if by_value and kept["RANDOM"] else "*i32",
        "stats": "*fp64" if kept["STATS"] else "*i32",
    }
    return compile_kernel(kernel.multi_tensor, tables, constants, target, {"rows", "keys"})


def compile_kernel(
    function: Any, tables: dict[str, Any], constants: dict[str, Any], target: GPUTarget, others: Collection[str] = ()
) -> Any:
    """Triton's compiled kernel.

    Args:
        function: the ``@triton.jit`` function.
        tables: the types of the arguments that are not constants. They are tensors that torch allocates, at multiples
            of 64 or more.
        constants: the others, and the launch options; what the function does not take is left out.
        others: of `tables`, what is no such tensor.
    """
    options = {name: constants[name] for name in ("num_warps", "enable_fp_fusion") if name in constants}
    constants = {name: constants[name] for name in function.arg_names if name in constants}
    order = [*tables, *constants]
    source = ASTSource(
        fn=function,
        signature=tables | dict.fromkeys(constants, "constexpr"),
        constexprs={(order.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(tables) if name not in others},
    )
    return triton.compile(source, target=target, options=options)


def listings(kernels: Sequence[Any]) -> list[str]:
    """SASS, as nvdisasm prints it for raw instructions, or amdgcn, of each of the kernels.

    nvdisasm takes as long to start as to read a hundred kernels: those of one architecture are read together.
    """
    texts = [kernel.asm.get("amdgcn", "") for kernel in kernels]
    of_architecture: dict[str, list[int]] = {}
    for i, kernel in enumerate(kernels):
        if "cubin" in kernel.asm:
            of_architecture.setdefault(_architecture(kernel), []).append(i)
    for architecture, own in of_architecture.items():
        code = [_code(kernels[i].asm["cubin"]) for i in own]
        # Without data-flow analysis, which serves the branch stack of old GPUs and takes a third of the tool's time.
        printed = _run_on("nvdisasm", ["-ndf", "-b", architecture], b"".join(code))
        rows = [row for row in printed.splitlines(keepends=True) if row.lstrip().startswith("/*")]
        for i, own_code in zip(own, code, strict=True):
            count = len(own_code) // _INSTRUCTION
            texts[i] = "".join(rows[:count])
            rows = rows[count:]
    return texts


def _architecture(compiled: Any) -> str:
    """As nvdisasm has it: SM90a."""
    match = re.search(r"^\.target sm_(\w+)", compiled.asm["ptx"], re.MULTILINE)
    assert match is not None
    return f"SM{match[1]}"


def _code(cubin: bytes) -> bytes:
    """The instructions: the one section of code in an ELF file of 64 bits."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    start = sections[names][4]
    (code,) = (cubin[at : at + n] for name, _, _, _, at, n in sections if cubin.startswith(b".text.", start + name))
    return code


def resources(compiled: Any) -> Resources:
    """Registers and memory, from the metadata of the binary."""
    if "cubin" in compiled.asm:
        usage = _run_on("cuobjdump", ["--dump-resource-usage"], compiled.asm["cubin"])
        registers, stack, local = (_number(rf"\b{word}:(\d+)", usage) for word in ("REG", "STACK", "LOCAL"))
        return Resources(registers, None, 0, stack + local, compiled.metadata.shared)
    text = compiled.asm["amdgcn"]
    names = ("vgpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    vector, scalar, *spilled, stack = (_number(rf"\.{name}:\s+(\d+)", text) for name in names)
    return Resources(vector, scalar, sum(spilled), stack, compiled.metadata.shared)


def code_bytes(compiled: Any, instructions: int) -> int:
    """The size of the kernel. `instructions`: how many it has; on NVIDIA all are as long."""
    if "cubin" in compiled.asm:
        return _INSTRUCTION * instructions
    return _number(r"; codeLenInByte = (\d+)", compiled.asm["amdgcn"])


def ptx_functions(compiled: Any) -> list[str]:
    """The PTX instructions, some of them inexact, for divisions, roots and transcendental functions."""
    return sorted(set(re.findall(r"\b(?:div|r?sqrt|rcp|ex2|lg2|sin|cos|tanh)\.\w[.\w]*", compiled.asm.get("ptx", ""))))


def _run_on(tool: str, arguments: list[str], binary: bytes) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(binary)
        file.flush()
        path = getattr(triton.knobs.nvidia, tool).path
        return subprocess.run([path, *arguments, file.name], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(
            f"{pattern} is not in what Triton {triton.__version__} compiled: teach the audit how it says it"
        )
    return int(match[1])


_IR = re.compile(r"\s*(%\w+)(?::\d+)? = ([a-z_]+\.[a-z_]+)(.*)")


class _Value(NamedTuple):
    """What is known of a value in the IR from how it came about."""

    varies: bool = False  # read in memory, or made from that or from the program's number
    wraps: bool = False  # made by 32-bit arithmetic on what varies
    addresses: bool = False  # a pointer made from a number: one into a tensor


def wrapping_offsets(ttir: str) -> list[str]:
    """The values in Triton's IR that address or bound the elements of a tensor and may wrap at 2^31 elements.

    Such a value comes from what is read in memory, or from the program's number, by 32-bit arithmetic: widened after
    the product and not before, or never. Offsets within a chunk come from constants and may be 32-bit. The lines are
    read in order, since branches side by side use the same names.
    """
    values: dict[str, _Value] = {}
    found: set[str] = set()
    for match in filter(None, map(_IR.match, ttir.splitlines())):
        name, opcode, rest = match[1], match[2], match[3].split(" loc(")[0].rstrip()
        operands = re.findall(r"%\w+", rest)
        known = [values.get(operand, _Value()) for operand in operands]
        if opcode == "arith.cmpi" or (opcode == "tt.addptr" and known[0].addresses):
            found.update(operand for operand, value in zip(operands, known, strict=True) if value.wraps)
        if opcode in ("tt.load", "tt.get_program_id"):
            values[name] = _Value(varies="tensor<" not in rest)  # an element of a tensor is no offset
            continue
        varies = any(value.varies for value in known)
        narrow = opcode in ("arith.muli", "arith.addi", "arith.shli") and re.search(r"(: |x)i32>?$", rest)
        values[name] = _Value(
            varies,
            any(value.wraps for value in known) or bool(narrow and varies),
            opcode == "tt.int_to_ptr" or any(value.addresses for value in known[:1]),
        )
    return sorted(found)
