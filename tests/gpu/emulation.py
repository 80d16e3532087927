"""The CUDA kernels in the place of the CPU's, for a rehearsal with TRISKELE_GPU_DRY=emulated.

    TRISKELE_GPU_DRY=emulated python -m pytest tests/gpu -k "sla.forward"

tests/emulated.py compiles csrc/cuda for the CPU; the entries of the tables run as they are, on what it registers.
"""

from __future__ import annotations

import emulated
import torch

from triskele import _native
from triskele.backend import TABLES, Backend


class _Native:
    """torch.ops.triskele_native, with the emulated kernels before the CPU's."""

    def __init__(self, kernels, others):
        self.kernels, self.others = kernels, others

    def __getattr__(self, name):
        return getattr(self.kernels if hasattr(self.kernels, name) else self.others, name)


def install() -> None:
    """Every table with a CUDA entry gets it under the CPU's name, since its tensors are on the CPU."""
    if reasons := [*_native.cpu_library(), *emulated.why_not()]:
        raise RuntimeError("; ".join(reasons))
    kernels = emulated.load(*sorted(path.stem for path in emulated.SOURCES.glob("*.cu")))
    torch.ops.__dict__["triskele_native"] = _Native(kernels, torch.ops.triskele_native)
    for op, table in list(TABLES.items()):
        cuda = next((entry for entry in table if entry.name == "cuda"), None)
        rest = tuple(entry for entry in table if entry.name == "reference")
        TABLES[op] = rest if cuda is None else (Backend("cpu", cuda.run, cuda.why_not), *rest)
