"""No CUDA kernel reads outside its inputs or writes outside its outputs, by one element: the families' emulated tests
once more, inputs against inaccessible pages (tests/guard.py), outputs and scratch between them (tests/fence.c)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

TESTS = Path(__file__).parent
FAMILIES = {
    "adaln": "budget or strides",
    "route": "cpu_kernels_maps or layouts",
    "taa": "budget",
    "svdq": "int4_codes or int8_codes or widened or against_float64",
    "sla": "error_budget",
    "sla_backward": "against_the_float64_reference",
}
"""Family -> its tests of ragged sizes."""

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(bool(emulated.why_not()), reason="; ".join(emulated.why_not()))]


@pytest.fixture(scope="module")
def fence(tmp_path_factory):
    library = tmp_path_factory.mktemp("fence") / "fence.so"
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    assert compiler, "the package needs a compiler to build, and so does this test"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, TESTS / "fence.c", "-ldl"], check=True)
    return str(library)


def run(*arguments, side, fence):
    settings = {"TRISKELE_EMULATE_GUARD": side, "LD_PRELOAD": fence, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=TESTS, env={**os.environ, **settings}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_stay_inside_their_buffers(family, fence):
    """Behind them; before them by hand, as here with side="start"."""
    done = run("-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", FAMILIES[family], f"test_cuda_{family}.py",
               side="end", fence=fence)
    assert done.returncode == 0, done.stdout[-6000:]


def test_every_family_is_there():
    there = {path.stem.removeprefix("test_cuda_") for path in TESTS.glob("test_cuda_*.py")}
    assert there - {"compile", "guard"} == set(FAMILIES)


def test_a_write_past_a_buffer_is_a_fault(fence):
    """The probe writes to one element more than it has blocks."""
    code = ("import torch, test_emulate, guard\n"
            "x = guard.guarded(torch.zeros(9, dtype=torch.int32), 'end')\n"
            "print([test_emulate.call('chain', x, blocks) for blocks in (8, 9)])\n")
    done = run("-c", code, side="end", fence=fence)
    assert done.returncode == 0, done.stdout
    assert "['', 'emulate: block (8, 0, 0), thread 0: access to unmapped address" in done.stdout
