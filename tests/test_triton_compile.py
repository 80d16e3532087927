"""Every Triton kernel, compiled for every chip: no spills, no local memory, shared memory within the chip's, the matrix
instruction meant. A few launches of each family here; all of them by `python tests/triton_offline.py --full`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import torch
import triton_offline
from triton_offline import TARGETS, cases_of, check, families

from triskele.triton_kernels import configs


@pytest.mark.parametrize("chip", TARGETS)
@pytest.mark.parametrize("family", families())
def test_compiles(family, chip):
    built = [result for case in cases_of(family, chip) for result in check(case, chip)]
    assert built
    assert not [problem for _, problems in built for problem in problems]


def test_every_kernel_is_listed():
    """A kernel that no family's launches reach would go unproved."""
    written = set()
    for path in sorted((Path(triton_offline.__file__).parents[1] / "triton_kernels").glob("*.py")):
        lines = path.read_text().splitlines()
        kernels = [line.split("(")[0].removeprefix("def ") for line in lines if line.startswith("def ")]
        written.update(name for name in kernels if name.endswith("_kernel"))
    launched = {launch[0].fn.__name__ for family in families() for case in cases_of(family, 90)
                for launch in triton_offline.record(case.call, 90)}
    assert written == launched


@pytest.mark.parametrize("capability, chip", [(75, 80), (80, 80), (86, 89), (87, 80), (89, 89), (90, 90), (103, 100),
                                              (121, 120)])
def test_tiles_of_other_chips(monkeypatch, capability, chip):
    monkeypatch.setattr(configs, "capability", lambda _device: capability)
    device = torch.device("cuda")
    assert configs.chip_of(device) == chip
    table = {(chip, 64): "own", (32,): "shared"}
    assert configs.lookup(table, device, 64) == "own" and configs.lookup(table, device, 32) == "shared"
