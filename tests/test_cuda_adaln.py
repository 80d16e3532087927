"""csrc/cuda/adaln_sm80.cu, run thread by thread on the CPU: the float64 reference, hostile layouts, refusals."""

from __future__ import annotations

import itertools

import emulated
import pytest
import torch
from generators import heads_last, poisoned, strided, with_outliers
from test_adaln import INDEX, doubled, gate_of, inputs, modulate_of, plain_gate, plain_modulate
from tolerance import assert_within_budget

from triskele import backend
from triskele.ops.adaln import backends

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1), (2, 3, 7), (3, 5, 16), (2, 17, 384), (1, 2, 1153), (1, 2, 2088)]


def modulate(v, index=None, eps=1e-6):
    x, scale, shift, weight, bias = (v[k] for k in ("x", "scale", "shift", "weight", "bias"))
    return emulated.load("adaln_sm80").adaln_modulate(
        backends._unit_channels(x), *map(backends._float32, (scale, shift)), backends._index(index),
        *map(backends._float32, (weight, bias)), eps)


def gate(v, index=None):
    return emulated.load("adaln_sm80").adaln_gate(
        backends._unit_channels(v["residual"]), backends._unit_channels(v["x"]), backends._float32(v["gate"]),
        backends._index(index))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_within_budget(shape, dtype):
    for affine, rows in itertools.product((False, True), (None, 1, 2)):
        v = inputs(*shape, rows=rows, dtype=dtype, affine=affine)
        index = INDEX[:shape[0]] if rows == 2 else None
        exact, plain = modulate_of(doubled(v), index, "reference"), plain_modulate(v, index)
        got = modulate(v, index)
        assert got.dtype == dtype
        assert_within_budget(got, exact, plain, what=f"modulate {affine} {rows}",
                             floor=2 * torch.finfo(dtype).eps * max(1.0, float(exact.abs().max())))
        exact = gate_of(doubled(v), index, "reference")
        assert_within_budget(gate(v, index), exact, plain_gate(v, index), what=f"gate {rows}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_margins_and_outliers(dtype):
    plain = inputs(3, 5, 72, dtype=dtype, affine=True)
    plain["x"], plain["residual"] = with_outliers(plain["x"], 1e3, 0.05), with_outliers(plain["residual"])
    index = torch.tensor([2, 0, 0])
    want, gated = modulate(plain, index), gate(plain, index)
    assert want.isfinite().all() and gated.isfinite().all()
    ulp = torch.finfo(dtype).eps

    def same(got, like):  # one row of 72 channels is held by other threads where 16-byte loads do not fit
        assert torch.allclose(got.float(), like.float(), rtol=4 * ulp, atol=4 * ulp)
    for change in (strided, poisoned):
        v = {k: change(t) for k, t in plain.items()}
        same(modulate(v, change(index)), want), same(gate(v, change(index)), gated)
    swapped = {k: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t for k, t in plain.items()}
    assert torch.equal(modulate(swapped, index), want) and torch.equal(gate(swapped, index), gated)
    chunks = torch.cat([plain["shift"], plain["scale"], plain["gate"]], 1).chunk(3, 1)    # read in place
    v = plain | dict(shift=chunks[0], scale=chunks[1], gate=chunks[2])
    assert torch.equal(modulate(v, index), want) and torch.equal(gate(v, index), gated)
    odd = heads_last(torch.randn(2, 3, 5, 8).to(dtype))[:, :, :, 0]                       # no unit stride at all
    table = torch.randn(2, 5)
    v = dict(x=odd, scale=table, shift=table, weight=None, bias=None)
    assert torch.equal(modulate(v), modulate(v | dict(x=odd.contiguous())))


def test_a_large_mean_costs_no_digits():
    v = inputs(2, 3, 512)
    v["x"] = v["x"] + 1000
    assert_within_budget(modulate(v), modulate_of(doubled(v), None, "reference"), plain_modulate(v))


def test_a_nan_stays_in_its_token():
    v = inputs(2, 4, 56)
    clean, gated = modulate(v), gate(v)
    v["x"][1, 2, 7] = float("nan")
    got, kept = modulate(v), gate(v)
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[1, 2] = True
    assert got[bad].isnan().all() and torch.equal(got[~bad], clean[~bad])
    assert int(kept.isnan().sum()) == 1 and torch.equal(kept[~bad], gated[~bad])


def test_many_tokens_a_thread_block_in_any_order():
    """More tokens than thread blocks: each takes a few, across the end of a sample."""
    v = inputs(1, 4099, 8, rows=1, dtype=torch.bfloat16)
    want, gated = modulate_of(v, None, "cpu"), gate_of(v, None, "cpu")
    for got, like in ((modulate(v), want), (gate(v), gated)):
        assert (got.float() - like.float()).abs().max() <= torch.finfo(torch.bfloat16).eps * like.abs().max()
    small = inputs(2, 3, 600, dtype=torch.bfloat16)
    want = modulate(small)
    for name in ("backward", "random"):
        with emulated.order(name, 5):
            assert torch.equal(modulate(small), want)


def test_an_index_out_of_range_shows_as_nan():
    v = inputs(3, 2, 16, rows=2)
    got, gated = (f(v, torch.tensor([0, 2, -1])) for f in (modulate, gate))
    assert got[0].isfinite().all() and got[1:].isnan().all()
    assert gated[0].isfinite().all() and gated[1:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_empty(shape):
    v = inputs(*shape, affine=True)
    assert modulate(v).shape == shape and gate(v).shape == shape


def test_the_native_ops_guard_themselves():
    v, native = inputs(3, 4, 8), emulated.load("adaln_sm80")
    with pytest.raises(RuntimeError, match="a row for each sample, or one"):
        native.adaln_modulate(v["x"], v["scale"][:2], v["shift"][:2], None, None, None, 1e-6)
    with pytest.raises(RuntimeError, match="scale in float32"):
        native.adaln_modulate(v["x"], v["scale"].double(), v["shift"], None, None, None, 1e-6)
    with pytest.raises(RuntimeError, match="unit channel stride"):
        native.adaln_modulate(strided(v["x"]), v["scale"], v["shift"], None, None, None, 1e-6)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        native.adaln_gate(*(v[k].double() for k in ("residual", "x")), v["gate"], None)
    big = inputs(1, 1, 8193)
    with pytest.raises(RuntimeError, match="at most 8192 channels"):
        native.adaln_gate(big["residual"], big["x"], big["gate"], None)


def test_the_entries_say_why_not():
    v = inputs(2, 3, 8)
    for op, arguments in (("adaln.modulate", (v["x"], v["scale"], v["shift"], None, None, None, 1e-6)),
                          ("adaln.gate", (v["residual"], v["x"], v["gate"], None))):
        assert backend.explain(op, *arguments).reasons["cuda"] == ["takes cuda tensors, got cpu"]
        entry = {e.name: e for e in backend.TABLES[op]}["cuda"]
        assert entry.why_not(*arguments) == []
        assert entry.why_not(torch.zeros(1, 1, 8193, dtype=torch.float64), *arguments[1:]) == [
            "takes float32, float16 and bfloat16, got torch.float64", "takes up to 8192 channels, got 8193"]
