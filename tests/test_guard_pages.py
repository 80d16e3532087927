"""No kernel reads or writes outside its buffers: not by one element, at any ragged size.

Inputs lie against inaccessible pages (tests/guard.py); what the kernels allocate, outputs and scratch, lies between
guard pages and marked margins of its own (tests/fence.c). The calls are those of tests/fuzz.py, in processes of their
own: a fault is a failed case that names its op, dtype and shape.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
import torch
from guard import guarded, guarded_arguments

from triskele import _native
from triskele.ops import gate_residual

TESTS = Path(__file__).parent
CASES = 40 * len(fuzz.CASES)


def python(*arguments, **environment):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=TESTS,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


@pytest.fixture(scope="module")
def fence(tmp_path_factory):
    """tests/fence.c as a library to load first."""
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    assert compiler, "the package needs a compiler to build, and so does this test"
    library = tmp_path_factory.mktemp("fence") / "fence.so"
    done = subprocess.run([compiler, "-O1", "-g", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library,
                           TESTS / "fence.c", "-ldl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(library)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["end", "start"])
def test_kernels_stay_inside_their_buffers(side, fence):
    done = python("fuzz.py", "--guard", side, "--cases", str(CASES), "--seed", "11", "--jobs", "1", LD_PRELOAD=fence)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{CASES} of {CASES} cases of {len(fuzz.CASES)} ops" in done.stdout


# ---- the nets themselves catch what they are for

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 17), (4096,), (2, 3, 4097)])
def test_guarded_tensors_are_the_same(shape, dtype):
    x = torch.randn(shape).mul(3).to(dtype)
    for side in ("start", "end"):
        copy = guarded(x, side)
        assert copy.dtype == dtype and copy.stride() == x.stride() and torch.equal(copy.float(), x.float())
    if len(shape) > 1:
        for view in (x.mT, x[..., ::2], x[:, :1].expand(x.shape)):
            copy = guarded(view, "end")
            assert copy.stride() == view.stride() and torch.equal(copy.float(), view.float())


@pytest.mark.parametrize("side, at", [("end", 17), ("start", -1)])
@pytest.mark.parametrize("what", ["read", "write"])
def test_one_element_past_a_guarded_tensor_is_a_fault(side, at, what):
    act = {"read": "p[{at}]", "write": "p[{at}] = 0"}[what].format(at=at)
    code = ("import ctypes, torch; from guard import guarded\n"
            f"x = guarded(torch.randn(17), '{side}')\n"
            "p = ctypes.cast(x.data_ptr(), ctypes.POINTER(ctypes.c_float))\n"
            f"p[0], p[16]\nprint('inside', flush=True)\n{act}\nprint('outside')")
    done = python("-c", code)
    assert done.returncode < 0 and done.stdout == "inside\n", done.stderr


def test_a_fault_is_reported_as_a_failure_of_its_case(tmp_path):
    """A kernel that reads one element too many, in one op's launcher."""
    code = ("import ctypes, sys, fuzz, fuzz_adaln\n"
            "real = fuzz_adaln.gate_residual\n"
            "def bad(residual, x, gate, *rest, **kwargs):\n"
            "    ctypes.string_at(8 if gate.shape[-1] > 20 else gate.data_ptr(), 1)\n"
            "    return real(residual, x, gate, *rest, **kwargs)\n"
            "fuzz_adaln.gate_residual = bad\n"
            "if __name__ == '__main__':\n"
            "    sys.exit(fuzz.main(['--op', 'adaln.gate', '--cases', '12', '--jobs', '1']))\n")
    (tmp_path / "broken.py").write_text(code)
    done = python(str(tmp_path / "broken.py"), PYTHONPATH=f"{TESTS}:{os.environ.get('PYTHONPATH', '')}")
    assert done.returncode == 1 and "ended by signal 11" in done.stdout, done.stdout + done.stderr
    assert "--op adaln.gate --seed 0 --case" in done.stdout and "dtype=torch." in done.stdout
    assert "12 of 12 cases" in done.stdout


def test_a_kernel_that_writes_to_an_input_is_found(monkeypatch):
    import guard

    def bad(x, *_rest):
        x.view(-1)[0] += 1
        return x

    assert not _native.cpu_library()
    monkeypatch.setattr(torch.ops.triskele_native, "adaln_gate", bad, raising=False)
    monkeypatch.setattr(guard, "_native_ops", lambda: ["adaln_gate"])
    x = torch.zeros(1, 2, 8)
    with guarded_arguments("end"), pytest.raises(AssertionError, match=r"adaln_gate wrote to its input \[1, 2, 8\]"):
        gate_residual(x, x, x[:, 0], backend="cpu")


@pytest.mark.parametrize("byte, verdict", [(0, True), (40, True), (41, False), (-1, False), (-60, False)])
def test_the_fence_sees_one_byte(byte, verdict, fence):
    """Of an allocation of 41 bytes."""
    code = ("import ctypes; libc = ctypes.CDLL(None)\n"
            "libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
            "libc.fence.argtypes = [ctypes.c_int]; libc.fence(1); p = libc.malloc(41); libc.fence(0)\n"
            f"ctypes.memset(p + {byte}, 1, 1); libc.free(p); print('fine')")
    done = python("-c", code, LD_PRELOAD=fence)
    assert (done.returncode == 0 and done.stdout == "fine\n") == verdict, done.stderr
