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
import triton_page
from triton_offline import TARGETS, cases_of, check, families

from triskele.triton_kernels import configs


@pytest.mark.parametrize("chip", TARGETS)
@pytest.mark.parametrize("family", families())
def test_compiles(family, chip):
    built = [result for case in cases_of(family, chip) for result in check(case, chip)]
    assert built
    assert not [problem for _, problems in built for problem in problems]


@pytest.mark.parametrize("chip", TARGETS)
def test_every_kernel_is_listed(chip):
    """A kernel that no family's launches reach on a chip would go unproved there."""
    written = set()
    for path in sorted((Path(triton_offline.__file__).parents[1] / "triton_kernels").glob("*.py")):
        lines = path.read_text().splitlines()
        kernels = [line.split("(")[0].removeprefix("def ") for line in lines if line.startswith("def ")]
        written.update(name for name in kernels if name.endswith("_kernel"))
    launched = {launch[0].fn.__name__ for family in families() for case in cases_of(family, chip)
                for launch in triton_offline.record(case.call, chip)}
    assert written == launched


@pytest.mark.parametrize("capability, chip", [(75, 80), (80, 80), (86, 89), (87, 80), (89, 89), (90, 90), (103, 100),
                                              (121, 120)])
def test_tiles_of_other_chips(monkeypatch, capability, chip):
    monkeypatch.setattr(configs, "capability", lambda _device: capability)
    device = torch.device("cuda")
    assert configs.chip_of(device) == chip
    table = {(chip, 64): "own", (32,): "shared"}
    assert configs.lookup(table, device, 64) == "own" and configs.lookup(table, device, 32) == "shared"


def test_the_page_is_of_these_kernels():
    """docs/triton_kernels.md, rendered by `python tests/triton_offline.py --write`."""
    assert not triton_page.stale()
    kernels = {line.split(" ")[1] for line in triton_page.PAGE.read_text().splitlines() if "| sm_" in line}
    assert kernels == {launch[0].fn.__name__ for family in families() for case in cases_of(family, 90)
                       for launch in triton_offline.record(case.call, 90)}


def test_a_page_of_other_kernels_is_stale(monkeypatch, tmp_path):
    text = triton_page.PAGE.read_text()
    other = tmp_path / "page.md"
    monkeypatch.setattr(triton_page, "PAGE", other)
    other.write_text(text.replace("| vmoba_keys_kernel | sm_90 | BM 64", "| vmoba_keys_kernel | sm_90 | BM 32"))
    lines = triton_page.stale()
    assert len(lines) == 2 and "is not launched: | vmoba_keys_kernel | sm_90 | BM 32" in lines[0]
    other.write_text(text)
    monkeypatch.setattr(triton_page, "sources", lambda: "other")
    assert triton_page.stale() == ["the kernels' sources have changed since"]


def test_only_code_counts_as_a_source(tmp_path):
    files = [tmp_path / f"{i}.py" for i in range(3)]
    for path, text in zip(files, ("def f(x):\n    \"\"\"One.\"\"\"\n    return x  # y\n",
                                  "def f(x):\n    \"\"\"Two.\"\"\"\n    return x\n",
                                  "def f(x):\n    \"\"\"One.\"\"\"\n    return -x\n")):
        path.write_text(text)
    one, two, other = map(triton_page._code, files)
    assert one == two != other


@pytest.mark.parametrize("chip, registers, shared, warps, tensor, blocks", [
    (90, 168, 100 << 10, 8, 0, 1), (90, 96, 100 << 10, 8, 0, 2), (80, 40, 0, 4, 0, 12), (89, 32, 0, 4, 0, 12),
    (120, 32, 40 << 10, 4, 0, 2), (100, 64, 0, 4, 256, 2), (90, 16, 0, 1, 0, 32), (89, 16, 0, 1, 0, 24)])
def test_occupancy(chip, registers, shared, warps, tensor, blocks):
    assert triton_page.occupancy(chip, registers, shared, warps, tensor) == blocks
