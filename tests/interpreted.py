"""Runs an `interpreted_<family>.py` in Triton's interpreter: in a process of its own, because the interpreter must be
chosen before Triton is imported.

The interpreter multiplies the raw bits of bfloat16, so float32 and float16 stand for all dtypes there; and it is slow,
so shapes are tiny.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run_interpreted(file: str, part: str, least: int) -> None:
    """Fails unless `file`'s tests that match `part` (pytest's -k) all pass, at least `least` of them, none skipped."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file, "-k", part], cwd=HERE,
                         env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed.group(1)) >= least and "skipped" not in run.stdout, run.stdout[-2000:]
