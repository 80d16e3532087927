"""What nvcc made of csrc/cuda/*.cu, read without a GPU: registers, shared and local memory, matrix instructions.

    python tests/cuda_offline.py [stem ...]          a line for each kernel and chip; ends with 1 where a rule is broken
    python tests/cuda_offline.py --newer [stem ...]  also what ptxas makes of the PTX on chips after sm_90
    python tests/cuda_offline.py --write             renders docs/gpu_kernels.md, after a run of the emulated tests that
                                                     tells threads and dynamic shared memory of the launches

The kernels come from the library where it was built from the source and all it includes as they are now
(built_from.json beside it); otherwise the source is compiled.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

from machine_code import Function

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc" / "cuda"
LIBRARY = ROOT / "python" / "triskele" / "libtriskele_cuda.so"
CACHE = ROOT / "build" / "offline"
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
CHIPS = {"sm80": (80, 90), "sm90": (90,)}
NEWER = (100, 120)
"""Chips that translate the PTX of *_sm80.cu."""

EXPECTED = {
    ("sla_forward_sm90", "forward_kernel"): {90: "HGMMA"},
    ("sla_forward_sm90", "state_kernel"): {90: "HMMA"},
    ("sla_forward_sm90", "cover_kernel"): {90: "HMMA"},
    ("sla_backward_sm90", "query_kernel"): {90: "HGMMA"},
    ("sla_backward_sm90", "key_kernel"): {90: "HGMMA"},
    ("sla_backward_sm90", "key_states_kernel"): {90: "HMMA"},
    ("sla_backward_sm90", "query_linear_kernel"): {90: "HMMA"},
    ("sla_backward_sm90", "key_linear_kernel"): {90: "HMMA"},
    ("sla_backward_sm90", "cover_kernel"): {90: "HMMA"},
    ("svdq_quantize_sm80", "quantize_kernel"): {80: "HMMA", 90: "HMMA"},
    ("svdq_w4a4_sm80", "w4a4_kernel"): {80: "IMMA", 90: "IMMA"},
    ("svdq_w4a8_sm90", "w4a8_kernel"): {90: "IGMMA"},
    ("svdq_w8a8_sm90", "w8a8_kernel"): {90: "IGMMA"},
}
"""(source, kernel) -> the matrix instruction that a loop of its code must hold, by chip."""

MATRIX = re.compile(r"\b(HGMMA|IGMMA|QGMMA|HMMA|IMMA|DMMA|BMMA)\b")
LOCAL = re.compile(r"\b(STL|LDL)\b")


@dataclass(frozen=True)
class Kernel:
    """One instantiation on one chip."""

    source: str  # the file's stem
    name: str  # with template arguments
    chip: int
    registers: int  # a thread
    stack: int  # bytes a thread
    shared: int  # bytes a block, static
    matrix: dict  # matrix instructions in the code, by name
    local: int  # loads and stores of local memory
    groups: int = 0  # matrix instructions that end a wgmma group
    looped: int = 0  # matrix instructions that lie in a loop

    @property
    def short(self) -> str:
        return self.name.split("<")[0].split("::")[-1]

    def problems(self) -> list[str]:
        """Broken rules: no spills, no local memory, shared memory within the chip's, the matrix instruction meant."""
        who, found = f"{self.source}: {self.name} sm_{self.chip}", []
        if self.stack or self.local:
            found.append(f"{who}: {self.stack} bytes of stack, {self.local} loads and stores of local memory")
        if self.shared > min(48 << 10, SHARED_BYTES[self.chip]):
            found.append(f"{who}: {self.shared} bytes of static shared memory")
        warpgroups = sum(count for name, count in self.matrix.items() if name.endswith("GMMA"))
        if 2 < warpgroups == self.groups:
            found.append(f"{who}: each of {warpgroups} wgmma ends a group of its own: the compiler has serialised them")
        wanted = EXPECTED.get((self.source, self.short), {}).get(self.chip)
        if wanted and (wanted not in self.matrix or not self.looped):
            found.append(f"{who}: expected {wanted} in a loop, got {self.matrix or 'no matrix instruction'}, "
                         f"{self.looped} of them in loops")
        return found


# ---- tools --------------------------------------------------------------------------------------------------------

@functools.cache
def setup_names() -> dict:
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


@functools.cache
def tool(name: str) -> str | None:
    """cuobjdump, say: beside nvcc, or in Triton's package."""
    places = [Path(home) / "bin" for home in [os.environ.get("CUDA_HOME")] if home]
    try:
        import triton
        places.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    except ImportError:
        pass
    return shutil.which(name) or next((str(p / name) for p in places if (p / name).exists()), None)


def why_not() -> list[str]:
    """What this machine lacks; empty when kernels can be read."""
    reasons = [] if setup_names()["nvcc"]() else ["no nvcc on PATH or in CUDA_HOME"]
    return reasons + ([] if tool("cuobjdump") else ["no cuobjdump on PATH, in CUDA_HOME or in Triton's package"])


def output(*command) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")
    return done.stdout


def stems() -> list[str]:
    return sorted(path.stem for path in SOURCES.glob("*.cu"))


def closure(path: Path) -> set[Path]:
    """A source and the headers of csrc that it includes, directly or not."""
    found, todo = set(), [path]
    while todo:
        at = todo.pop()
        if at in found:
            continue
        found.add(at)
        for name in re.findall(r'^\s*#include "([^"]+)"', at.read_text(), re.M):
            todo += [place for place in (at.parent / name, ROOT / "csrc" / name) if place.exists()][:1]
    return {place.resolve() for place in found}


# ---- reading ------------------------------------------------------------------------------------------------------

def read(binary: Path, of_cubin: int = 0) -> list[Kernel]:
    """Every kernel in a library, object or fat binary that nvcc wrote, or in a cubin, which does not tell its chip. The
    source's stem stands in the mangled name of its anonymous namespace; empty where there is none."""
    found, chip, name = {}, of_cubin, ""
    for line in output(tool("cuobjdump"), "-res-usage", binary).splitlines():
        if match := re.match(r"\s*arch = sm_(\d+)", line):
            chip = int(match[1])
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            shared -= 1024 if chip >= 90 and shared else 0  # there the system's share is counted in
            found[chip, name] = {"registers": registers, "stack": stack + local, "shared": shared, "matrix": Counter(),
                                 "looped": Function(), "local": 0, "groups": 0}
    for line in output(tool("cuobjdump"), "-sass", binary).splitlines():
        if match := re.match(r"\s*arch = sm_(\d+)", line):
            chip = int(match[1])
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
        elif "/*" in line and (chip, name) in found:
            code = line.split("*/", 1)[-1]
            found[chip, name]["looped"].feed(line)
            if match := MATRIX.search(code):
                found[chip, name]["matrix"][match[1]] += 1
                found[chip, name]["groups"] += "gsb0" in code
            elif LOCAL.search(code):
                found[chip, name]["local"] += 1
    names = sorted({name for _, name in found})
    plain = dict(zip(names, output("c++filt", *names).splitlines())) if names else {}
    kernels = []
    for (chip, name), values in found.items():
        source = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", name)
        short = re.sub(r"^void |\(anonymous namespace\)::|triskele::cuda::", "", plain[name])
        short = short.replace("(int)", "").replace("(bool)1", "true").replace("(bool)0", "false")
        short = re.sub(r"\(.*\)$", "", short)
        kernels.append(Kernel(source[1] if source else "", short, chip,
                              **{**values, "matrix": dict(values["matrix"]),
                                 "looped": values["looped"].in_loops(MATRIX)}))
    return kernels


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def library_sources() -> dict[str, str]:
    """Path -> SHA-256 of what the library was built from; empty where there is none."""
    record = LIBRARY.with_name("built_from.json")
    if not (LIBRARY.exists() and record.exists()):
        return {}
    return json.loads(record.read_text()).get(LIBRARY.name, {})


@functools.cache
def of_library() -> list[Kernel]:
    return read(LIBRARY)


def compiled(stem: str, folder: Path) -> Path:
    """The source's fat binary for its targets of setup.py, PTX included."""
    names = setup_names()
    target = folder / f"{stem}.fatbin"
    flags = [flag for flag in names["NVCC_FLAGS"] if not flag.startswith("-Xcompiler")]
    output(names["nvcc"](), *flags, *names["NVCC_TARGETS"][stem.rsplit("_", 1)[-1]], f"-I{names['torch_paths']()[0]}",
           f"-I{ROOT / 'csrc'}", "-fatbin", SOURCES / f"{stem}.cu", "-o", target)
    return target


def kernels(stem: str, newer: bool = False) -> list[Kernel]:
    """The kernels of a source on its chips (newer: and on those that translate its PTX)."""
    files = sorted(closure(SOURCES / f"{stem}.cu"))
    key = hashlib.sha1(b"".join(path.read_bytes() for path in files) + (ROOT / "setup.py").read_bytes()
                       + Path(__file__).read_bytes()).hexdigest()
    record = CACHE / f"{stem}{'.newer' if newer else ''}.json"
    if record.exists() and (known := json.loads(record.read_text()))["key"] == key:
        return [Kernel(**values) for values in known["kernels"]]
    found = []
    if not newer and all(library_sources().get(str(path.relative_to(ROOT))) == digest(path) for path in files):
        found = [kernel for kernel in of_library() if kernel.source == stem]
    if not found:
        with tempfile.TemporaryDirectory() as folder:
            binary = compiled(stem, Path(folder))
            found = read(binary)
            if newer and stem.endswith("_sm80"):
                subprocess.run([tool("cuobjdump"), "-xptx", "all", binary], cwd=folder, check=True, capture_output=True)
                for chip in NEWER:
                    for ptx in Path(folder).glob("*.ptx"):
                        cubin = ptx.with_suffix(".cubin")
                        output(setup_names()["nvcc"](), f"-arch=sm_{chip}", "-cubin", ptx, "-o", cubin)
                        found += read(cubin, chip)
    found = [Kernel(**{**asdict(kernel), "source": stem}) for kernel in found]
    CACHE.mkdir(parents=True, exist_ok=True)
    temporary = record.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"key": key, "kernels": [asdict(kernel) for kernel in found]}))
    temporary.replace(record)
    return found


# ---- the page -----------------------------------------------------------------------------------------------------

def occupancy(registers: int, shared: int, threads: int) -> int:
    """Blocks that one H100 multiprocessor holds: 65536 registers given to warps in units of 256, 228 KiB of shared
    memory of which a block takes 1 KiB more than it uses, 64 warps, 32 blocks."""
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    return min(by_registers, (228 << 10) // (shared + 1024), 64 // warps, 32)


def launches(path: Path) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """(source, kernel) -> (threads, dynamic shared bytes) of the launches that the emulator wrote down."""
    found, symbols = {}, {}
    for line in sorted(set(path.read_text().splitlines())):
        library, offset, threads, shared = line.split("\t")
        if library not in symbols:
            rows = (row.split(" ", 2) for row in output("nm", "-C", library).splitlines() if row[:1] != " ")
            symbols[library] = {int(at, 16): name for at, _, name in rows}
        match = re.search(r"(\w+)(?:<.*>)?\(", symbols[library][int(offset)].replace("(anonymous namespace)::", ""))
        found.setdefault((Path(library).stem, match[1]), []).append((int(threads), int(shared)))
    return found


def emulated_launches() -> dict[tuple[str, str], list[tuple[int, int]]]:
    """The launches of the families' tests, which run where a source has changed since."""
    key = hashlib.sha1(b"".join(path.read_bytes() for path in sorted(SOURCES.rglob("*.cu*")))).hexdigest()
    record = CACHE / "launches.json"
    if record.exists() and (known := json.loads(record.read_text()))["key"] == key:
        return {tuple(name.split("/")): ran for name, ran in known["launches"].items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launches"
        files = [test for test in sorted((ROOT / "tests").glob("test_cuda_*.py"))
                 if test.stem not in ("test_cuda_compile", "test_cuda_guard")]
        done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", *files],
                              cwd=ROOT, env={**os.environ, "TRISKELE_EMULATE_LAUNCHES": str(path)})
        if done.returncode:
            raise RuntimeError("the emulated tests have failed")
        found = launches(path)
    record.write_text(json.dumps({"key": key, "launches": {"/".join(name): ran for name, ran in found.items()}}))
    return found


def page(known: dict) -> str:
    lines = [
        "# The CUDA kernels as compiled", "",
        "Rendered by `python tests/cuda_offline.py --write` from the machine code and from the launches of the",
        "emulated tests ([how](gpu.md)); not written by hand, and nothing here was timed. A row is a kernel on a chip,",
        "the largest of what it is compiled for: registers a thread, threads a block, bytes of shared memory a block",
        "(static and dynamic), blocks that an H100 multiprocessor holds at once, and the matrix instructions in the",
        "code. All are without spills and without local memory (tests/test_cuda_compile.py).", "",
        "| source | kernel | compiled | chip | registers | threads | shared memory | blocks an SM | matrix |",
        "|---|---|---:|---|---:|---:|---:|---:|---|",
    ]
    for stem in stems():
        groups = {}
        for kernel in kernels(stem):
            groups.setdefault((kernel.short, kernel.chip), []).append(kernel)
        for (short, chip), group in sorted(groups.items()):
            registers, static = max(k.registers for k in group), max(k.shared for k in group)
            matrix = ", ".join(sorted({name for k in group for name in k.matrix}))
            ran = known.get((stem, short), [])
            threads, dynamic = max((t for t, _ in ran), default=0), max((s for _, s in ran), default=0)
            shared = static + dynamic
            if shared > SHARED_BYTES[90]:
                raise ValueError(f"{stem}: {short} takes {static} + {dynamic} bytes of shared memory, H100 has "
                                 f"{SHARED_BYTES[90]}")
            blocks = str(occupancy(registers, shared, threads)) if ran and chip == 90 else ""
            lines.append(f"| {stem} | {short} | {len(group)} | sm_{chip} | {registers} | {threads or ''} | {shared} | "
                         f"{blocks} | {matrix} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("stems", nargs="*")
    parser.add_argument("--newer", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if reasons := why_not():
        sys.exit("; ".join(reasons))
    if arguments.write:
        (ROOT / "docs" / "gpu_kernels.md").write_text(page(emulated_launches()))
        return 0
    problems = []
    for stem in arguments.stems or stems():
        for kernel in sorted(kernels(stem, arguments.newer), key=lambda k: (k.chip, k.name)):
            matrix = " ".join(f"{name} x{count}" for name, count in kernel.matrix.items())
            print(f"{stem:20} sm_{kernel.chip:<4} {kernel.registers:3} registers {kernel.shared:6} shared "
                  f"{kernel.stack:3} stack {kernel.local:3} local  {matrix:12} {kernel.name}", flush=True)
            problems += kernel.problems()
    print(*problems, sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
