"""The 4-bit linear's Triton kernels: the cases of interpreted_svdq.py, in processes of their own; and what the
tables refuse."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from interpreted import needs_triton, run_interpreted

from triskele import explain
from triskele.backend import TABLES
from triskele.ops.svdq import triton_backend


@needs_triton
@pytest.mark.parametrize("part, least", [("budget", 32), ("published", 10), ("not budget and not published", 18)])
def test_interpreted(part, least):
    run_interpreted("interpreted_svdq.py", part, least)


def arguments(x, format="int4", activation="int8", group=64, rank=4, scales=None):
    """What the table's entry is asked about; the values do not matter."""
    k, n = x.shape[1], 32
    group = 16 if format == "nvfp4" else group
    scales = scales or (torch.float8_e4m3fn if format == "nvfp4" else torch.bfloat16)
    return (x, torch.zeros(n, k // 2, dtype=torch.uint8), torch.ones(n, k // group).to(scales),
            torch.ones(1) if format == "nvfp4" else None, torch.zeros(rank, k), torch.zeros(n, rank), torch.ones(k),
            None, format, activation, 0.0)


def test_tables_name_the_reasons():
    x = torch.randn(2, 384)
    for op in ("svdq.w4a8", "svdq.w4a16"):
        choice = explain(op, *arguments(x), backend="triton")
        assert choice.chosen is None and choice.reasons["triton"] == ["takes cuda tensors, got cpu"]
    for op in ("svdq.w4a4", "svdq.w4a8_fp8", "svdq.w4a4_fp4"):
        assert "triton" not in [entry.name for entry in TABLES[op]]


@pytest.mark.parametrize("changes, reason", [
    ({"x": torch.randn(2, 384, dtype=torch.float64)}, "takes float16, bfloat16 and float32, got torch.float64"),
    ({"group": 32}, "takes int4 groups of 64 and 128, got 32"),
    ({"group": 192}, "takes int4 groups of 64 and 128, got 192"),
    ({"format": "nvfp4", "scales": torch.bfloat16}, "takes nvfp4 scales in float8_e4m3fn, got torch.bfloat16"),
    ({"rank": 257}, "takes ranks up to 256, got 257")])
def test_refusals(changes, reason):
    assert triton_backend.why_not(*arguments(**{"x": torch.randn(2, 384), **changes})) == [reason]


def test_takes_the_rest():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.randn(2, 384).to(dtype)
        for changes in ({}, {"group": 128}, {"format": "nvfp4"}, {"rank": 256}, {"rank": 0}):
            assert triton_backend.why_not(*arguments(x, **changes)) == []


@needs_triton
def test_nothing_is_contracted_where_codes_are_made():
    """z (127 / a) is rounded before it is rounded to an integer: no fused multiply-add, divisions to nearest."""
    import triton
    import triton_offline
    from triton_launches_svdq import cases

    launches = triton_offline.record(next(cases(90, False)).call, 90)
    launch = next(launch for launch in launches if launch[0].fn.__name__ == "quantize_kernel")
    compiled = []

    def compile_(*args, **kwargs):
        compiled.append(triton_compile(*args, **kwargs))
        return compiled[-1]
    triton_compile = triton.compile
    with mock.patch.object(triton, "compile", compile_), mock.patch.object(triton_offline, "_BUILT", {}):
        triton_offline.build(launch, 90)
    ptx = compiled[0].asm["ptx"]
    assert "div.rn.f32" in ptx and "mul.rn.f32" in ptx and "fma.rn.f32" not in ptx and "div.full.f32" not in ptx
