"""The adaLN Triton kernels: the cases of interpreted_adaln.py, in processes of their own; and what the
tables refuse."""

from __future__ import annotations

import pytest
import torch
from interpreted import needs_triton, run_interpreted

from triskele import _native, explain
from triskele.backend import TABLES


@needs_triton
@pytest.mark.parametrize("part, least", [("budget", 20), ("not budget", 8)])
def test_interpreted(part, least):
    run_interpreted("interpreted_adaln.py", part, least)


def test_tables_name_the_reasons():
    x, row = torch.randn(2, 3, 8), torch.randn(2, 8)
    for op, given in (("adaln.modulate", (x, row, row, None, None, None, 1e-6)), ("adaln.gate", (x, x, row, None))):
        entry = next(b for b in TABLES[op] if b.name == "triton")
        assert entry.missing is _native.triton_package
        choice = explain(op, *given, backend="triton")
        assert choice.chosen is None and choice.reasons["triton"] == ["takes cuda tensors, got cpu"]
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert entry.why_not(x.to(dtype), *given[1:]) == []
        assert entry.why_not(x.double(), *given[1:]) == ["takes float16, bfloat16 and float32, got torch.float64"]
        assert entry.why_not(x.new_empty(1, 1, 16384)) == []
        assert entry.why_not(x.new_empty(1, 1, 16385)) == ["takes up to 16384 channels, got 16385"]
