"""What Triton compiles and launches with the stub driver, and what a step's launches must be."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from triton_optim import RuleOptimizer
from triton_optim.backends.triton import norm as triton_norm
from triton_optim.backends.triton import stats as triton_stats
from triton_optim.backends.triton import stub_driver
from triton_optim.backends.triton.stub_driver import Launched
from triton_optim.kernels import gradient_norm, measure, multi_tensor, rows, symmetric_product
from triton_optim.spec import Measured

BLOCK = multi_tensor.BLOCK
KERNELS = {
    kernel.fn.__name__: kernel
    for kernel in (
        multi_tensor.multi_tensor,
        gradient_norm.partial_norms,
        gradient_norm.gradient_stats,
        rows.form_rows,
        measure.measure,
        measure.sum_chunks,
        symmetric_product.symmetric_product,
    )
}
# Triton's names of dtypes.
NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
}
POINTED = {f"*{name}": dtype for dtype, name in NAMES.items()}
RESIDUALS = ("master", "compensation", "residual", "residual_low")  # of a parameter, among its states


def address(value: Any) -> int:
    """Where a pointer argument points; the driver takes tensors and addresses."""
    return value if isinstance(value, int) else value.data_ptr()


class Seen(NamedTuple):
    """A launch, and the tables that its kernel will read, as they were when it was launched."""

    launch: Launched
    values: dict[str, Any]  # the arguments by name
    tables: dict[str, Tensor]

    def constant(self, name: str) -> Any:
        """The value of a constexpr."""
        value = self.values[name]
        return value.value if isinstance(value, triton.language.constexpr) else value

    def read(self, name: str, *shape: int) -> Tensor:
        """Read the memory that a pointer argument points to, as the type that the kernel takes it for."""
        dtype = POINTED[self.launch.signature[name]]
        memory = (ctypes.c_char * (prod(shape) * dtype.itemsize)).from_address(address(self.values[name]))
        return torch.frombuffer(memory, dtype=dtype).clone().view(shape)

    def has(self, name: str) -> bool:
        """Whether the kernel has an argument of this name and reads it, or writes it. Others are any table."""
        options = {key: self.constant(key) for key in ("RANDOM", "STATS", "KIND") if key in self.values}
        unread = {"numbers", "keys"} if not options.get("RANDOM", True) else set()
        if options.get("STATS") in (False, "none"):
            unread.add("stats")
        if options.get("STATS") in ("none", "read"):
            unread |= {"partials", "max_norm"}
        if options.get("KIND") == "none":
            unread |= {"partials", "max_norm"}
        return name in self.values and name not in unread

    @property
    def columns(self) -> int:
        """Of the table of tensors: the number of elements, the row, and the addresses."""
        return 2 + len(self.constant("DTYPES")) - 1

    def read_tables(self) -> None:
        """Of the kernel that updates: nothing else is known to be there."""
        programs = self.launch.grid[0]
        chunks = self.tables["chunks"] = self.read("chunks", programs, 2)
        count = int(chunks[:, 0].max()) + 1
        assert 0 < count <= programs
        self.tables["tensors"] = self.read("tensors", count, self.columns)
        self.tables["gradients"] = self.read("gradients", count)
        last = int(self.tables["tensors"][:, 1].max())
        assert 0 <= last < count
        width = 1 + len(self.constant("FIELDS")) + self.constant("AVERAGED")
        if isinstance(self.values["rows"], tuple):  # the only row, by value
            assert last == 0
            self.tables["rows"] = torch.tensor([self.values["rows"]], dtype=torch.float32)
        else:
            self.tables["rows"] = self.read("rows", last + 1, width)
        if self.constant("RANDOM"):
            self.tables["numbers"] = self.read("numbers", count, 3)


class Recorder:
    """Takes down what is compiled and launched.

    Attributes:
        launched: every launch.
        compiled: the name and hash of every kernel that Triton did not have in memory.
        files: by hash, what it was compiled to.
    """

    def __init__(self) -> None:
        self.launched: list[Seen] = []
        self.compiled: list[tuple[str, str]] = []
        self.files: dict[str, dict[str, str]] = {}

    @contextmanager
    def listening(self, target: str) -> Iterator[Recorder]:
        """Be told of what is compiled and launched, for this target."""
        knobs, before = triton.knobs.compilation, triton.knobs.compilation.listener
        knobs.listener = self.on_compile
        stub_driver.install(target, self.on_launch)
        try:
            yield self
        finally:
            knobs.listener = before
            stub_driver.install()

    def on_launch(self, launch: Launched) -> None:
        seen = Seen(launch, launch.values(), {})
        if launch.name == "multi_tensor":
            seen.read_tables()
        if seen.has("max_norm"):
            seen.tables["max_norm"] = seen.read("max_norm", 1)
        self.launched.append(seen)

    def on_compile(self, *, metadata: dict[str, Any], metadata_group: dict[str, str], **_: Any) -> None:
        """For triton.knobs.compilation.listener."""
        self.compiled.append((metadata["name"], metadata["hash"]))
        self.files[metadata["hash"]] = metadata_group

    def taken(self) -> list[Seen]:
        """The launches since the last call."""
        taken = self.launched[:]
        self.launched.clear()
        return taken

    def text(self, seen: Seen, kind: str) -> str:
        """What a kernel that was launched was compiled to: ``"ttir"``, ``"ptx"``, ..."""
        files = self.files[seen.launch.metadata.hash]
        return Path(next(path for name, path in files.items() if name.endswith(f".{kind}"))).read_text()


def forget_kernels() -> None:
    """Let Triton, and what starts its kernels, forget those in memory."""
    for kernel in KERNELS.values():
        kernel.device_caches.clear()
    triton_norm.norm_launcher.cache_clear()
    triton_stats.stats_launcher.cache_clear()


class Spy:
    """Keeps what an optimizer's `scalars` returned last for each of its groups, with what `kept_scalars` made of it."""

    def __init__(self, optimizer: RuleOptimizer) -> None:
        self.returned: dict[int, Any] = {}
        scalars, kept_scalars = optimizer.scalars, optimizer.kept_scalars

        def kept(group: dict[str, Any], *given: Any, **scalar_state: Any) -> Any:
            self.returned[group["number"]] = scalars(group, *given, **scalar_state)
            return self.returned[group["number"]]

        def filled(measured: Measured) -> dict[str, Any]:
            found, number = kept_scalars(measured), measured.group["number"]
            self.returned[number] = self.returned[number]._replace(**found)
            return found

        for number, group in enumerate(optimizer.param_groups):
            group["number"] = number
        optimizer.scalars, optimizer.kept_scalars = kept, filled  # type: ignore[method-assign]


def check_step(step: list[Seen], optimizer: RuleOptimizer, spy: Spy | None) -> None:
    """Fail unless these launches are a step of all parameters.

    Args:
        spy: of the scalars, where each group has one row of them.
    """
    updates = [seen for seen in step if seen.launch.name == "multi_tensor"]
    own = {p.data_ptr(): (p, number) for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    updated: list[int] = []
    for update in updates:
        formed = any(seen.launch.name == "form_rows" for seen in step)
        updated += check_update(update, optimizer, own, None if formed else spy)
    assert sorted(updated) == sorted(place for place, (p, _) in own.items() if p.grad is not None)
    # Where something comes before the rule, the norm and what is done with it are formed before that.
    if not any(optimizer.running_variant(g).staged for g in optimizer.param_groups):
        check_stats(step, optimizer)
        if len(updates) == 1:
            check_what_is_shared(step)


def check_arguments(seen: Seen, ir: str) -> None:
    """The kernel is given what it declares, in its order, of the types and multiples that it was compiled for.

    Args:
        ir: the kernel in Triton's IR.
    """
    launch, kernel = seen.launch, KERNELS[seen.launch.name]
    assert list(launch.signature) == kernel.arg_names
    assert launch.grid[0] > 0
    assert launch.grid[1:] == (1, 1)
    multiples = re.findall(r"%(\w+): !tt\.ptr<\w+> \{tt\.divisibility = 16", ir)
    if launch.name != "symmetric_product":  # whose accesses are as wide as sizes and strides allow
        assert ir.count("tt.divisibility = 16") == len(multiples), "an integer was compiled for"
    for name, kind in launch.signature.items():
        value = seen.values[name]
        if kind == "i32":
            assert -(2**31) <= value < 2**31, name
        elif kind in POINTED:
            assert address(value) % (16 if name in multiples else POINTED[kind].itemsize) == 0, name
            assert not isinstance(value, Tensor) or value.dtype == POINTED[kind], name


def check_update(
    seen: Seen, optimizer: RuleOptimizer, own: dict[int, tuple[Tensor, int]], spy: Spy | None
) -> list[int]:
    """What the kernel reads in its tables is where each parameter, its gradient and its states lie.

    Args:
        own: the parameters and the numbers of their groups, by address.
        spy: of the scalars of this step; None where the device forms them.

    Returns:
        The addresses of the parameters that are updated.
    """
    chunks, tensors, gradients, rows = (seen.tables[name] for name in ("chunks", "tensors", "gradients", "rows"))
    first, dtypes = seen.constant("FIRST"), [str(d).replace("int", "i") for d in seen.constant("DTYPES")]
    found = []
    for number, (numel, row, *addresses) in enumerate(tensors.tolist()):
        assert addresses[0] in own, "no parameter lies there"
        p, group = own[addresses[0]]
        gradient = int(gradients[number])
        if p.grad is None:
            assert gradient == 0
            continue
        found.append(addresses[0])
        assert numel == p.numel()
        covered = chunks[chunks[:, 0] == number, 1]
        assert covered.sort().values.equal(torch.arange(ceil(numel / BLOCK), dtype=torch.int32)), "elements left out"
        variant = optimizer.running_variant(optimizer.param_groups[group])
        state = optimizer.state.get(p, {})
        parts = [p, *(state[name] for name in RESIDUALS if name in state)]
        assert first[1] == len(parts)
        for name in variant.state_names:
            parts += [state[part] for part in (name, f"{name}_scale") if part in state]
        assert addresses == [part.data_ptr() for part in parts]
        assert dtypes[: first[1]] + dtypes[first[2] :] == [NAMES[part.dtype] for part in parts]
        if not variant.prologue:
            assert gradient == p.grad.data_ptr()
            assert dtypes[first[1]] == NAMES[p.grad.dtype]
        assert seen.constant("ALIGNED") == all(x % 16 == 0 for x in (gradient, *addresses))
        if spy is not None:
            h = spy.returned[group]
            assert seen.constant("FIELDS") == h._fields
            assert isinstance(h, seen.constant("SCALARS"))
            # But for what differs between parameters, which is made of sums that nothing has computed here.
            own_factors = {name for bucket in optimizer.engine.plan.buckets for name in bucket.factors}
            alike = [i for i, name in enumerate(h._fields) if name not in own_factors]
            given = torch.tensor([float(x) for x in h], dtype=rows.dtype)
            # What is kept of such sums may be NaN.
            torch.testing.assert_close(rows[row, 1 : 1 + len(h)][alike], given[alike], rtol=0, atol=0, equal_nan=True)
            if not variant.prologue:  # which scales gradients itself
                assert float(rows[row, 0]) == (-1 if optimizer.param_groups[group].get("maximize") else 1)
        if seen.constant("RANDOM"):
            place = [q is p for g in optimizer.param_groups for q in g["params"]].index(True)
            assert seen.tables["numbers"][number].tolist() == [0, 0, place]
    assert len(chunks) == sum(ceil(numel / BLOCK) for numel in tensors[:, 0].tolist())
    return found


def check_what_is_shared(step: list[Seen]) -> None:
    """In a step of one bucket, what has one name in several launches is one piece of memory."""
    for name in ("chunks", "tensors", "gradients", "partials", "stats", "rows", "keys"):
        readers = [seen for seen in step if seen.has(name) and seen.launch.signature[name] in POINTED]
        places = {address(seen.values[name]) for seen in readers}
        assert len(places) <= 1, name
    for seen in step:
        if seen.launch.name == "partial_norms":
            (update,) = (other for other in step if other.launch.name == "multi_tensor")
            programs = update.launch.grid[0]
            assert (seen.values["count"], seen.values["columns"]) == (programs, update.columns)
            assert seen.launch.grid[0] == ceil(programs / gradient_norm.CHUNKS)
            (forms,) = (other for other in step if other.has("partials") and other is not seen)
            assert forms.values["count"] == seen.launch.grid[0]


def check_stats(step: list[Seen], optimizer: RuleOptimizer) -> None:
    """What is read of the scaler and of the norm."""
    forms = [seen for seen in step if "grad_scale" in seen.values and seen.values.get("STATS", "form") == "form"]
    assert len(forms) == optimizer.scales_gradients
    for seen in forms:
        told = optimizer.amp is not None and optimizer.found_inf is not None
        looks = optimizer.amp is not None and not told
        assert (seen.constant("FOUND"), seen.constant("SKIP")) == (told, looks)
        assert seen.constant("SCALED") == (optimizer.amp is not None)
        if optimizer.amp is not None:
            assert address(seen.values["grad_scale"]) == optimizer.grad_scale.data_ptr()
        if told:
            assert address(seen.values["found_inf"]) == optimizer.found_inf.data_ptr()
        assert seen.constant("KIND") == ("2" if looks or optimizer.max_grad_norm is not None else "none")
        if optimizer.max_grad_norm is not None:
            assert seen.tables["max_norm"].item() == optimizer.max_grad_norm


def compiled_for(module: Any) -> dict[str, str]:
    """Of each optimizer class of a module, its kernel for sm_90 in Triton's IR."""
    found = {}
    for name, cls in vars(module).items():
        if isinstance(cls, type) and issubclass(cls, RuleOptimizer) and cls.__module__ == module.__name__:
            recorder = Recorder()
            with recorder.listening("sm_90"):
                p = torch.nn.Parameter(torch.zeros(8))
                p.grad = torch.zeros(8)
                cls([p], backend="triton").step()
                (seen,) = recorder.launched
                found[name] = recorder.text(seen, "ttir")
    return found
