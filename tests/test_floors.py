"""The page on the GPU kernels says what bench/floors.py computes."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

FLOORS = runpy.run_path(str(Path(__file__).parent.parent / "bench" / "floors.py"))


def test_the_page_is_rendered():
    page = FLOORS["PAGE"].read_text()
    assert FLOORS["rendered"](page) == page


def test_rows():
    rows = {(row.kernel, row.shape): row for row in FLOORS["rows"]()}
    assert len(rows) == len(FLOORS["rows"]())
    for row in rows.values():
        assert row.bytes > 0 and (row.predicted is None) == (not row.why)
        assert row.predicted is None or row.predicted > max(row.bytes_ms, row.operations_ms), row.kernel
    dense = FLOORS["WAN"].products(32760)
    assert dense == 4 * 12 * 32760**2 * 128
    row = next(row for name, row in rows.items() if name[0].startswith("forward"))
    assert row.bytes == 4 * 2 * 12 * 32760 * 128 and 0.04 < row.operations["bf16"] / dense < 0.06


def test_every_triton_kernel_has_a_row():
    sources = (Path(__file__).parent.parent / "triton_kernels").glob("*.py")
    kernels = {name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)}
    assert kernels == {name for row in FLOORS["triton"]() for name in row.launches}
    assert not any(row.launches for row in FLOORS["cuda"]())
    assert all(row.predicted is not None for row in FLOORS["triton"]())
