"""The kernels under AddressSanitizer and UBSan (`make sanitize` runs more of the same)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import sanitize

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def levels():
    if not sanitize.runtime():
        pytest.skip(f"{sanitize.COMPILER} has no AddressSanitizer")
    levels = sanitize.levels_to_check()
    sanitize.build(levels)
    return levels


def under(level, *command):
    return subprocess.run([sys.executable, *command], cwd=TESTS.parent, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, **sanitize.environment(level)})


@pytest.mark.slow
def test_the_kernels_pass(levels):
    for level in levels:
        done = under(level, "-c", "from triskele import _native; print(_native.cpu_level())\n"
                                  "print([line.split()[-1] for line in open('/proc/self/maps')])")
        assert done.stdout.startswith(f"{level}\n") and str(sanitize.FOLDER) in done.stdout, done.stdout
        done = under(level, "tests/fuzz.py", "--cases", "330", "--seed", "31", "--minutes", "5", "--jobs", "1")
        assert done.returncode == 0 and "330 of 330 cases" in done.stdout, done.stdout
    done = kernels.run(["-x"], quick=True, **sanitize.environment(levels[0]))
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.parametrize("source, findings", [
    ("int f(int n) { volatile int* a = new int[4]; int x = a[n]; delete[] a; return x; }",
     ("heap-buffer-overflow", "insufficient space")),
    ("int f(int n) { return 2147483643 + n; }", ("signed integer overflow",))])
def test_findings_end_the_process(tmp_path, source, findings):
    """Over the end by one element, and over the largest integer, with the flags and environment of the build."""
    if not sanitize.runtime():
        pytest.skip(f"{sanitize.COMPILER} has no AddressSanitizer")
    (tmp_path / "bad.cpp").write_text(f'extern "C" {source}')
    library = tmp_path / "bad.so"
    subprocess.run([*sanitize.COMPILER.split(), *sanitize.FLAGS.split(), "-shared", "-fPIC", tmp_path / "bad.cpp", "-o",
                    library], check=True)
    code = f"import ctypes; f = ctypes.CDLL('{library}').f; f(3); print('fine', flush=True); f(4); f(5)"
    done = under("", "-c", code)
    assert done.returncode and done.stdout.startswith("fine\n") and any(
        finding in done.stdout for finding in findings), done.stdout  # the first of them to see it ends the process
    assert "bad.cpp" in done.stdout
