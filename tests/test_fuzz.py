"""10,000 random calls within a time box, and that a fuzz run finds and names what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
import torch
from fuzz_draw import Draw

TESTS = Path(__file__).parent
SEEDS, CASES, LEAST, MINUTES = (20, 21), 5000, 2500, 4.0
"""10,000 cases in two halves, which two workers of the suite run side by side: a quiet core does some 50 cases a second
(development reading, Xeon with AMX), a core of a fifth of that speed gets through the least within the box."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_ten_thousand_random_calls(seed):
    done = subprocess.run([sys.executable, TESTS / "fuzz.py", "--cases", str(CASES), "--seed", str(seed), "--minutes",
                           str(MINUTES), "--jobs", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = int(done.stdout.split()[0])
    assert ran == CASES or (ran >= LEAST and f"{60 * MINUTES:.0f} s" in done.stdout), done.stdout


def test_every_native_op_is_fuzzed():
    """A new kernel needs cases of its own."""
    import triskele as tk

    ours = {row.op for row in tk.backends() if row.backend == "cpu"}
    known = {"vmoba.attention_backward": "vmoba.attention", "svdq.w4a8": "svdq.linear"}  # part of another's case
    assert {known.get(op, op) for op in ours} == set(fuzz.CASES) - {"sla.large", "vmoba.large"}


def test_a_case_is_its_seed_and_number():
    for op in fuzz.CASES:
        first, again, other = (str(fuzz.run_case(op, 4, case)) for case in (6, 6, 7))
        assert first == again != other
        assert first.startswith(fuzz.facts(op, 4, 6))


WRONG = """
import sys, fuzz, fuzz_adaln
real = fuzz_adaln.gate_residual
def wrong(residual, *rest, **kwargs):
    out = real(residual, *rest, **kwargs)
    out.view(-1)[-1:] += 100
    return out
fuzz_adaln.gate_residual = wrong
sys.exit(fuzz.main(sys.argv[1:]))
"""


def test_a_wrong_result_is_reported_with_its_command():
    """One element of the output, in one op's launcher."""
    def run(*command):
        done = subprocess.run([sys.executable, *command], cwd=TESTS, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, out = run("-c", WRONG, "--op", "adaln.gate", "--cases", "6", "--jobs", "1")
    assert code == 1 and "y: error " in out, out
    again = out.split("python tests/fuzz.py ")[1].splitlines()[0].split()
    assert again[:5] == ["--op", "adaln.gate", "--seed", "0", "--case"]
    code, out = run("-c", WRONG, *again)
    assert code == 1 and "y: error " in out, out
    code, out = run("fuzz.py", *again)
    assert code == 0 and "dtype=torch." in out, out


def test_layouts_hold_the_same_values():
    seen = set()
    for n in range(60):
        draw = Draw(str(n))
        x = draw.values(3, 4, 5).float()
        placed, layout = draw.place(x)
        assert torch.equal(placed, x)
        seen.add((layout.split()[0], placed.stride()))
    assert len(seen) > 20
