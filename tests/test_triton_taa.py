"""The fused step's Triton kernels: the cases of interpreted_taa.py, in processes of their own; and what the
tables refuse."""

from __future__ import annotations

import pytest
from interpreted import needs_triton, run_interpreted
from test_taa import inputs

from triskele import _native, explain
from triskele.backend import TABLES


@needs_triton
@pytest.mark.parametrize("part, least", [("budget or order", 10), ("not budget and not order", 15)])
def test_interpreted(part, least):
    run_interpreted("interpreted_taa.py", part, least)


def test_tables_name_the_reasons():
    v = inputs(6, 20, slots=5)
    given = (v["x"], v["eps"], v["noise"], v["a"], v["b"], v["c"], v["past_r"], 6)
    entries = {op: next(b for b in TABLES[f"taa.{op}"] if b.name == "triton") for op in ("residual", "update", "gamma")}
    for op, entry in entries.items():
        assert entry.missing is _native.triton_package
        choice = explain(f"taa.{op}", *given, backend="triton")
        assert choice.chosen is None and choice.reasons["triton"] == ["takes cuda tensors, got cpu"]
    memory = ["takes memory up to 5, got 6"]
    update = (v["x"], v["x"][1:], v["past_x"], v["past_r"], v["gamma"], v["eps"])
    assert entries["residual"].why_not(*given) == entries["update"].why_not(*update) == memory
    assert entries["gamma"].why_not(v["a"], None, None, v["a"], [1] * 5, 1e-3, True) == memory
    half = (v["x"].half(), v["eps"].half(), *given[2:6], [], 6)
    assert entries["residual"].why_not(*half) == [
        "takes states in float32 or float64, got torch.float16"]
    assert entries["residual"].why_not(*given[:6], v["past_r"][:4], 6) == []
    four = (v["x"], v["x"][1:], v["past_x"][:4], v["past_r"][:4], v["gamma"], v["eps"].bfloat16())
    assert entries["update"].why_not(*four) == []
    assert entries["gamma"].why_not(v["a"], None, None, v["a"], [], 1e-3, True) == []
