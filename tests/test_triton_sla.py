"""The SLA kernels in Triton's interpreter (the cases of interpreted_sla.py), and what their table entries refuse.

All cases: `TRITON_INTERPRET=1 python -m pytest interpreted_sla.py`, in tests/.
"""

from __future__ import annotations

import pytest
import torch
from interpreted import needs_triton, run_interpreted

from triskele import explain
from triskele.ops.sla import triton_backend


@needs_triton
@pytest.mark.parametrize("part, least", [
    ("not vectors and not budget and not backward", 9),
    ("vectors and ((seed903 and float32) or (elu_q64k64_seed0 and float16 and top50) or "
     "(top25_softmax_q128k64_seed1 and float32))", 6),
    ("budget or backward", 12),
])
def test_interpreted(part, least):
    run_interpreted("interpreted_sla.py", part, least)


def test_refusals():
    q = torch.randn(1, 1, 8, 200, dtype=torch.float64)
    assert triton_backend.why_not(q, q) == [
        "takes float16, bfloat16 and float32, got torch.float64", "takes head_dim D <= 128 in multiples of 8, got 200"]
    assert triton_backend.why_not(q[..., :64].half(), q) == []
    assert triton_backend.why_not(q[..., :65].half(), q) == ["takes head_dim D <= 128 in multiples of 8, got 65"]
    long = torch.empty(1, 1, 2 ** 30, 8, dtype=torch.half, device="meta")
    assert triton_backend.why_not(long, q) == [f"takes fewer than 2^30 tokens, got {2 ** 30}"]


def test_the_tables_say_why_not():
    q = torch.randn(1, 1, 8, 16)
    choice = explain("sla.route", q, q, 1, 0, 8, 8, None, None)
    assert choice.chosen == "cpu" and choice.reasons["triton"] == ["takes cuda tensors, got cpu"]
    if not torch.cuda.is_available():
        assert "no CUDA device" in triton_backend.missing()
