"""Every instruction-set level that this CPU has passes the kernels' tests (`make test-levels` runs all of those)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernels
import pytest

ROOT = Path(__file__).parent.parent
LEVELS = kernels.levels()


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_a_selection_on_each_level(level):
    chosen = {"TRISKELE_CPU_LEVEL": level}
    done = subprocess.run([sys.executable, "tests/fuzz.py", "--cases", "440", "--seed", "41", "--minutes", "4",
                           "--jobs", "1"], cwd=ROOT, env={**os.environ, **chosen}, capture_output=True, text=True)
    assert done.returncode == 0 and "440 of 440 cases" in done.stdout, done.stdout + done.stderr
    if level != LEVELS[-1]:  # the best one is what the whole suite runs on
        done = kernels.run(["-x"], quick=True, **chosen)
        assert done.returncode == 0, done.stdout[-8000:]


def test_levels_start_with_the_plain_one():
    assert LEVELS[0] == "base" and len(set(LEVELS)) == len(LEVELS)
