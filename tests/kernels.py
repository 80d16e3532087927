"""The tests of the CPU kernels: what runs under the sanitizers and on every instruction-set level.

    python tests/kernels.py [pytest arguments]      on the level that TRISKELE_CPU_LEVEL names
    python tests/kernels.py levels [arguments]      on each level of this CPU and this build, one after the other
    python tests/kernels.py all-levels [arguments]  the same, with the tests of all that calls the kernels
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
FAMILIES = ("route", "sla", "vmoba", "svdq", "taa", "adaln")
CALLERS = ("backend", "configs", "contract", "far", "finetune", "integer", "nunchaku", "patch", "quantize", "sampling")
"""Of the layers above the kernels: the rest of the suite does not depend on the level, or starts its own processes."""
LEFT_OUT = "compile or instruction_set"
"""Tests of the compiler, and those that start a process a level themselves."""
QUICK = "budget or definition or integers or against_float64"
"""One or two tests a family that walk its kernels through ragged shapes."""


def files(names=FAMILIES) -> list[str]:
    """The test files of the kernels' families, or of those named."""
    found = sorted(str(path) for name in names for path in TESTS.glob(f"test_{name}*.py"))
    missing = [name for name in names if not any(f"test_{name}" in path for path in found)]
    if missing:
        sys.exit(f"no tests of {', '.join(missing)}")
    return found


def levels() -> list[str]:
    """The levels that the library was built for and this CPU has, weakest first."""
    from triskele import _C, _native

    if reasons := _native.cpu_library():
        sys.exit("\n".join(reasons))
    built = _C.cpu_levels()
    return built[:built.index(_native.cpu_level()) + 1]


def run(arguments=(), *, quick=False, callers=False, **environment) -> subprocess.CompletedProcess:
    """The kernels' tests in a process of their own, with these environment variables; its output is captured."""
    chosen = f"({QUICK}) and not ({LEFT_OUT})" if quick else f"not ({LEFT_OUT})"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", chosen,
               *files(FAMILIES + CALLERS * callers), *arguments]
    return subprocess.run(command, cwd=TESTS.parent, env={**os.environ, **environment}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def main(arguments) -> int:
    every = arguments[:1] in (["levels"], ["all-levels"])
    chosen = levels() if every else [os.environ.get("TRISKELE_CPU_LEVEL", "")]
    failed = []
    for level in chosen:
        done = run(arguments[every:], callers=arguments[:1] == ["all-levels"], TRISKELE_CPU_LEVEL=level)
        print(f"level {level or 'best'}: {done.stdout if done.returncode else done.stdout.strip().splitlines()[-1]}",
              flush=True)
        failed += [level] if done.returncode else []
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
