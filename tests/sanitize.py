"""The CPU library built with AddressSanitizer and UBSan, in a folder of its own, and a command run under it.

    python tests/sanitize.py                        builds, then the kernels' tests and a slice of the fuzz run
    python tests/sanitize.py -- COMMAND ...         builds, then the command

A finding ends the process with the stack of the bad access. What the compiler cannot see (masked vector loads, tile
instructions) is held by the guard pages: tests/guard.py.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import kernels

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "sanitized"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = "-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"


def runtime() -> list[str]:
    """The libraries to load before all others, the C++ one beside the sanitizer's so that it sees exceptions thrown;
    empty where the compiler has no sanitizer."""
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        done = subprocess.run([*shlex.split(COMPILER), f"-print-file-name={name}"], capture_output=True, text=True)
        if done.returncode or not os.path.isabs(path := done.stdout.strip()):
            return []
        paths.append(path)
    return paths


def environment(level: str = "") -> dict[str, str]:
    """What a process needs to run under the sanitizers."""
    return {
        "LD_PRELOAD": " ".join(runtime()), "TRISKELE_NATIVE_DIR": str(FOLDER / "triskele"), "TRISKELE_CPU_LEVEL": level,
        # GCC 12 places the frames that detect_stack_use_after_return asks for without their 64-byte alignment
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def build(levels) -> None:
    """Compiles what is not up to date; the normal library is not touched."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    settings = {"TRISKELE_CXXFLAGS": FLAGS, "TRISKELE_BUILD_LEVELS": " ".join(levels),
                "CUDA_HOME": str(FOLDER / "no-cuda")}
    command = ["flock", FOLDER / "lock", sys.executable, "setup.py", "-q", "build_ext", "--build-lib", FOLDER,
               "--build-temp", FOLDER / f"objects-{sysconfig.get_platform()}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{shlex.join(map(str, command))}\n{done.stdout}")


def levels_to_check() -> list[str]:
    """The best one first; the plain one; and the one whose products of tiles no other level has."""
    best_first = kernels.levels()[::-1]
    return [level for level in best_first if level in ("base", "avx512_bf16", best_first[0])]


def main(arguments) -> int:
    if not runtime():
        sys.exit(f"{COMPILER} has no AddressSanitizer")
    build(levels := levels_to_check())
    if arguments[:1] == ["--"]:
        return subprocess.run(arguments[1:], cwd=ROOT, env={**os.environ, **environment()}).returncode
    failed = 0
    for level in levels:
        done = kernels.run(["-x", "-n", "2", *arguments], **environment(level))
        print(f"level {level}: {done.stdout if done.returncode else done.stdout.strip().splitlines()[-1]}", flush=True)
        fuzz = [sys.executable, "tests/fuzz.py", "--cases", "600", "--seed", "3", "--minutes", "1.5"]
        failed += bool(done.returncode) + bool(
            subprocess.run(fuzz, cwd=ROOT, env={**os.environ, **environment(level)}).returncode)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
