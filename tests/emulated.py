"""The CUDA kernels on a CPU: each csrc/cuda/<stem>.cu compiled by g++ against tests/emulate, one library a source.

    ops = emulated.load("adaln_sm80")          torch.ops.triskele_emulated, with that file's kernels behind its ops
    ops.adaln_gate(residual, x, gate, None)    CPU tensors
    with emulated.order("random", seed=3): ...  blocks, and the threads of each, in another order

A launch that deadlocks, leaves shared memory's bounds, misuses a barrier or reads through a misaligned pointer raises
RuntimeError with the block and the thread. Shared memory and asynchronous destinations hold NaN until they are written.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from guard import guarded_op

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc" / "cuda"
EMULATE = Path(__file__).parent / "emulate"
CACHE = ROOT / "build" / "emulated"
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
TORCH = Path(torch.__file__).parent


@functools.cache
def toolkit() -> Path | None:
    """The CUDA toolkit's headers: CUDA_HOME's, or those beside nvcc."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home)] if home else []
    if found := shutil.which("nvcc"):
        done = subprocess.run([found, "-v", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        tops = [line.split("=", 1)[1] for line in done.stderr.splitlines() if line.startswith("#$ TOP=")]
        candidates += [Path(top) for top in tops]
        if shutil.which("nvcc"):
            candidates.append(Path(found).resolve().parent.parent)
    return next((path / "include" for path in candidates if (path / "include" / "cuda_runtime.h").exists()), None)


@functools.cache
def why_not() -> list[str]:
    """What this machine lacks; empty when kernels can be emulated."""
    if not shutil.which(COMPILER[0]):
        return [f"no C++ compiler: {COMPILER[0]} is not on PATH"]
    name = subprocess.run([*COMPILER, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    reasons = [f"needs g++, whose precompiled headers and checks it uses, got {name}"] if "clang" in name else []
    return reasons + ([] if toolkit() else ["no CUDA headers: cuda_runtime.h is neither in CUDA_HOME nor beside nvcc"])


def flags() -> list[str]:
    return ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-march=native", "-w", "-DUSE_CUDA",
            "-DTRISKELE_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000",
            f"-I{EMULATE}", f"-I{ROOT / 'csrc'}", f"-isystem{toolkit()}", f"-I{TORCH / 'include'}"]


CHECKS = ["-fsanitize=alignment,bounds", "-fno-sanitize-recover=all", "-ffp-contract=fast"]


def digest(path: str) -> str:
    return hashlib.sha1(Path(path).read_bytes()).hexdigest() if Path(path).exists() else "absent"


@functools.cache
def compiler_version() -> str:
    return subprocess.run([*COMPILER, "-march=native", "-Q", "--help=target"], capture_output=True, text=True).stdout


def run_compiler(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stderr[-6000:]}")


def made(target: Path, command: list, depfile: Path | None, inputs: list[Path] = ()) -> Path:
    """Runs the command where its text, the compiler, or a file that it read last time has changed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _made(target, command, depfile, inputs)


def _made(target: Path, command: list, depfile: Path | None, inputs: list[Path]) -> Path:
    record = target.with_name(target.name + ".json")
    text = shlex.join(map(str, command)) + compiler_version() + torch.__version__
    if target.exists() and record.exists():
        last = json.loads(record.read_text())
        if last["command"] == text and all(digest(path) == known for path, known in last["files"].items()):
            return target
    record.unlink(missing_ok=True)
    target.unlink(missing_ok=True)   # a process that has the old library mapped keeps it
    run_compiler(command)
    read = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split() if depfile else []
    files = sorted({str(Path(path).resolve()) for path in [*read, *map(str, inputs)]})
    record.write_text(json.dumps({"command": text, "files": {path: digest(path) for path in files}}))
    return target


def compiled(source: Path, name: str, *, header: bool = False, checked: bool = False, plain: bool = False) -> Path:
    """An object file, or the precompiled header (checked: with the flags of the kernels, that it must match)."""
    target = CACHE / (f"{name}.gch" if header else f"{name}.o")
    depfile = CACHE / f"{name}.d"
    language = "c++-header" if header else "c++"
    start = [] if header or plain else [f"-I{CACHE}", "-include", "device.h"]
    command = [*COMPILER, *start, *flags(), *(CHECKS if checked else []), "-MMD", "-MF", depfile, "-x", language, "-c",
               source, "-o", target]
    inputs = [CACHE / "device.h.gch.json"] if checked and not header else []
    return made(target, command, depfile, inputs)


def linked(name: str, objects: list[Path]) -> Path:
    target = CACHE / f"{name}.so"
    runtime = [CACHE / "runtime.so"] if name != "runtime" else []
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"] if name != "runtime" else ["-ldl"]
    return made(target, [*COMPILER, "-shared", *objects, *runtime, *libraries, "-o", target], None, objects)


@functools.cache
def runtime() -> ctypes.CDLL:
    path = linked("runtime", [compiled(EMULATE / "runtime.cpp", "runtime", plain=True)])
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.triskele_emulate_order.argtypes = [ctypes.c_char_p, ctypes.c_ulonglong]
    return library


def build(source: Path, name: str) -> Path:
    """The library of one source; name: that of the files under build/emulated."""
    compiled(EMULATE / "device.h", "device.h", header=True, checked=True)
    cudart = compiled(EMULATE / "cudart.cpp", "cudart", plain=True)
    return linked(name, [compiled(source, name, checked=True), cudart])


@functools.cache
def schemas() -> None:
    """Defines the ops of csrc/schema.cpp as triskele_emulated::<op>."""
    runtime()
    path = linked("schema", [compiled(EMULATE / "schema.cpp", "schema", plain=True)])
    torch.ops.load_library(str(path))


@functools.cache
def _load(stem: str) -> None:
    schemas()
    torch.ops.load_library(str(build(SOURCES / f"{stem}.cu", stem)))
    if side := os.environ.get("TRISKELE_EMULATE_GUARD"):
        _guard(side)


def _guard(side: str) -> None:
    """Every emulated op on copies of its inputs that touch an inaccessible page at this side."""
    ops = torch.ops.triskele_emulated
    for name in {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
                 if name.startswith("triskele_emulated::")}:
        if isinstance(op := getattr(ops, name), torch._ops.OpOverloadPacket):
            setattr(ops, name, guarded_op(name, op, side, 16))   # what the kernels ask of addresses


def load(*stems: str):
    """torch.ops.triskele_emulated with the kernels of csrc/cuda/<stem>.cu; skips where `why_not` has reasons."""
    if reasons := why_not():
        pytest.skip("; ".join(reasons))
    for stem in stems:
        _load(stem)
    return torch.ops.triskele_emulated


@contextlib.contextmanager
def order(name: str, seed: int = 0):
    """Within: blocks, and the threads of one, run "forward", "backward", or in a "random" order drawn from the seed."""
    if runtime().triskele_emulate_order(name.encode(), seed):
        raise ValueError(f"expected forward, backward or random, got {name!r}")
    try:
        yield
    finally:
        runtime().triskele_emulate_order(b"forward", 0)


@contextlib.contextmanager
def processors(count: int):
    """Within: the device has this many multiprocessors (3 otherwise)."""
    runtime().triskele_emulate_processors(count)
    try:
        yield
    finally:
        runtime().triskele_emulate_processors(3)


if __name__ == "__main__":  # builds what is named and prints how long the compiler took
    import sys
    import time
    for stem in sys.argv[1:] or sorted(path.stem for path in SOURCES.glob("*.cu")):
        start = time.perf_counter()
        load(stem)
        print(f"{stem}: {time.perf_counter() - start:.1f} s")
