"""Compiles Triton launches for chips that are not here, and reads what came out.

Launchers run on meta tensors, so what is compiled is what would be launched, specialisation included; and a launcher
that waited for the device, or looked at a value, would fail here.

A family lists its launches in `triton_launches_<family>.py`:

    def cases(chip: int, full: bool) -> Iterator[Case]      full: every dtype, head_dim and option, not the suite's few
    def targets(chip: int) -> Iterator[Case]                the shapes that the kernels are made for

Kernels are the functions named `*_kernel`. `python tests/triton_offline.py [--full] [--family sla] [--chip 90]
[--case text] [--kernel text]` prints a line for each one built, and ends with 1 where one breaks a rule of `problems`.
`--write` renders the targets into docs/triton_kernels.md (triton_page.py).
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import machine_code
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from triskele.triton_kernels import configs

TARGETS = configs.CHIPS
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # that a block may take
MATRIX = re.compile(r"\b(HGMMA|IGMMA|QGMMA|HMMA|IMMA|QMMA|DMMA|UTC[A-Z]*MMA)\b")
LOCAL = re.compile(r"\b(STL|LDL)\b")
HALF = {80: ("HMMA",), 89: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",), 120: ("HMMA",)}
"""The matrix instruction of 16-bit products (and of tf32 ones) on large enough tiles, by chip."""


@dataclass(frozen=True)
class Case:
    """Launches to compile.

    call    runs launchers on meta tensors
    matrix  kernel name -> matrix instructions of which a loop of its code must hold one (`HALF[chip]`)
    """

    name: str
    call: Callable[[], None]
    matrix: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """What the compiler made of one launch."""

    name: str
    chip: int
    registers: int  # a thread
    stack: int  # bytes a thread: spills
    shared: int  # bytes a block
    warps: int
    matrix: dict  # matrix instructions in the machine code, by name
    local: int  # loads and stores of local memory
    looped: int = 0  # matrix instructions that lie in a loop
    tensor: int = 0  # columns of tensor memory a block, of 512 (sm_100)

    def problems(self, matrix: tuple[str, ...] = ()) -> list[str]:
        """Broken rules: no spills, no local memory, shared memory within the chip's, the matrix instruction meant."""
        found, who = [], f"{self.name} sm_{self.chip}"
        if self.stack or self.local:
            found.append(f"{who}: {self.stack} bytes of stack, {self.local} loads and stores of local memory")
        if self.shared > SHARED_BYTES[self.chip]:
            found.append(f"{who}: {self.shared} bytes of shared memory, has {SHARED_BYTES[self.chip]}")
        if matrix and not any(name in self.matrix for name in matrix):
            found.append(f"{who}: expected one of {matrix}, got {self.matrix}")
        if matrix and not self.looped:
            found.append(f"{who}: no matrix instruction in a loop")
        return found

    def __str__(self) -> str:
        return (f"sm_{self.chip} {self.name}: {self.registers} registers, {self.stack} stack, {self.local} local, "
                f"{self.shared} shared, {self.warps} warps, {self.matrix}")


def families() -> list[str]:
    return sorted(p.stem.removeprefix("triton_launches_") for p in Path(__file__).parent.glob("triton_launches_*.py"))


def cases_of(family: str, chip: int, full: bool = False) -> Iterator[Case]:
    yield from importlib.import_module(f"triton_launches_{family}").cases(chip, full)


def targets_of(family: str, chip: int) -> Iterator[Case]:
    yield from importlib.import_module(f"triton_launches_{family}").targets(chip)


@contextmanager
def recording(chip: int):
    """Inside, launches are appended to the list given, and nothing runs; launchers take the tiles of `chip`."""
    launches = []

    def run(self, *args, grid, warmup, **kwargs):
        assert all(isinstance(n, int) and n > 0 for n in grid), (self.fn.__name__, grid)
        launches.append((self, args, kwargs))

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(configs, "capability", lambda _device: chip):
        yield launches


def record(call: Callable[[], None], chip: int) -> list[tuple]:
    """(kernel, args, kwargs) of each launch that `call` makes on `chip`."""
    with recording(chip) as launches:
        call()
    assert launches, "nothing was launched"
    return launches


_BUILT: dict[str, Built] = {}


def build(launch: tuple, chip: int) -> Built:
    """Compiles one recorded launch."""
    kernel, args, kwargs = launch
    target = GPUTarget("cuda", chip, 32)
    backend = make_backend(target)
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    key = repr((kernel.fn.__module__, kernel.fn.__name__, chip, signature, constexprs, attrs, options))
    if key in _BUILT:
        return _BUILT[key]
    compiled = triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=target, options=options.__dict__)
    code, usage = _disassemble(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK"))
    _BUILT[key] = Built(kernel.fn.__name__, chip, registers, stack, compiled.metadata.shared, options.num_warps,
                        dict(Counter(MATRIX.findall(code))), len(LOCAL.findall(code)),
                        machine_code.function(code.splitlines()).in_loops(MATRIX),
                        getattr(compiled.metadata, "tmem_size", None) or 0)
    return _BUILT[key]


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(machine code, resource usage) by the tools in Triton's wheel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], check=True, capture_output=True, text=True).stdout
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name], check=True,
                               capture_output=True, text=True).stdout
    finally:
        os.unlink(file.name)
    return code, usage


def check(case: Case, chip: int, kernel: str = "") -> Iterator[tuple[Built, list[str]]]:
    """Each kernel of a case whose name holds `kernel`, with its broken rules."""
    launches = record(case.call, chip)
    names = {launch[0].fn.__name__ for launch in launches}
    assert names.issuperset(case.matrix), f"{case.name}: {sorted(set(case.matrix) - names)} was not launched"
    for launch in launches:
        name = launch[0].fn.__name__
        if kernel in name:
            built = build(launch, chip)
            yield built, [f"{case.name}: {p}" for p in built.problems(case.matrix.get(name, ()))]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel for chips that are not here.")
    parser.add_argument("--full", action="store_true", help="every dtype, head_dim and option")
    parser.add_argument("--family", action="append", help="one of the families, by name; default all")
    parser.add_argument("--chip", action="append", type=int, help="80, 89, 90, 100, 120; default all")
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--kernel", default="", help="only kernels whose name holds this")
    parser.add_argument("--write", action="store_true", help="render docs/triton_kernels.md")
    args = parser.parse_args()
    if args.write:
        import triton_page
        return triton_page.write()
    bad, seen = [], set()
    for family in args.family or families():
        for chip in args.chip or TARGETS:
            for case in cases_of(family, chip, args.full):
                if args.case not in case.name:
                    continue
                for built, problems in check(case, chip, args.kernel):
                    if (id(built), bool(problems)) not in seen:
                        print(f"{case.name}: {built}{'  <<<<' if problems else ''}", flush=True)
                    seen.add((id(built), bool(problems)))
                    bad += problems
    print(*bad, f"{len(seen)} kernels, {len(bad)} problems", sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
