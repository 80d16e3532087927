"""The VMoBA kernels in Triton's interpreter (the cases of interpreted_vmoba.py), and what their tables say."""

from __future__ import annotations

import pytest
import torch
from interpreted import needs_triton, run_interpreted

from triskele import explain
from triskele.backend import TABLES
from triskele.ops.vmoba import triton_backend

OPS = ("vmoba.select", "vmoba.attention", "vmoba.attention_backward")


@needs_triton
@pytest.mark.parametrize("part, least", [("select and not slow", 32), ("not select and not slow", 32)])
def test_interpreted(part, least):
    run_interpreted("interpreted_vmoba.py", part, least)


@pytest.mark.parametrize("shape, dtype, reasons", [
    ((1, 1, 8, 64), torch.bfloat16, []), ((1, 1, 8, 72), torch.float16, []), ((0, 1, 8, 128), torch.float32, []),
    ((1, 1, 8, 64), torch.float64, ["takes float16, bfloat16 and float32, got torch.float64"]),
    ((1, 1, 8, 136), torch.float16, ["takes head_dim D <= 128 in multiples of 8, got 136"]),
    ((1, 1, 8, 20), torch.float16, ["takes head_dim D <= 128 in multiples of 8, got 20"]),
    ((0, 1, 2 ** 30, 8), torch.float16, [f"takes fewer than 2^30 tokens, got {2 ** 30}"]),
])
def test_refusals(shape, dtype, reasons):
    q = torch.empty(shape, dtype=dtype, device="meta")
    assert triton_backend.why_not(q, q) == triton_backend.backward_why_not(None, q) == reasons


def test_tables():
    for op in OPS:
        (entry,) = (b for b in TABLES[op] if b.name == "triton")
        assert entry.verified == (), "only hardware verifies"
    q = torch.randn(1, 1, 8, 16)
    choice = explain("vmoba.select", q, q, None, torch.tensor([0, 8]).int(), "topk", "query", 1, 1.0)
    assert choice.chosen == "cpu" and choice.reasons["triton"] == ["takes cuda tensors, got cpu"]


def test_missing_says_what(monkeypatch):
    monkeypatch.setattr(triton_backend, "find_spec", lambda _name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_backend.missing() == ["triton is not installed", "no CUDA device"]
    monkeypatch.setattr(triton_backend, "find_spec", lambda _name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert triton_backend.missing() == ["needs compute capability 8.0 or later, got 7.5"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert triton_backend.missing() == []
