"""The adaLN Triton kernels in the interpreter, on CPU tensors. Run by test_triton_adaln.py in a process of its own."""

from __future__ import annotations

import itertools

import pytest
import torch
from far import Far
from generators import poisoned, strided, with_outliers
from test_adaln import INDEX, doubled, inputs, plain_gate, plain_modulate
from tolerance import assert_within_budget

from triskele.ops.adaln import reference, triton_backend


def modulate_of(v, index=None, eps=1e-6, run=triton_backend.modulate):
    return run(v["x"], v["scale"], v["shift"], index, v["weight"], v["bias"], eps)


def gate_of(v, index=None, run=triton_backend.gate):
    return run(v["residual"], v["x"], v["gate"], index)


@pytest.mark.parametrize("dtype, table", [(torch.float32, torch.float32), (torch.float16, torch.float32),
                                          (torch.float16, torch.float16), (torch.float32, torch.float64)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (3, 5, 16), (2, 9, 33), (1, 6, 1153), (1, 5, 8200)])
def test_within_budget(shape, dtype, table):
    for affine, rows in itertools.product((False, True), (None, 1, 2)):
        v = inputs(*shape, rows=rows, dtype=dtype, table=table, affine=affine)
        index = INDEX[:shape[0]] if rows == 2 else None
        assert triton_backend.why_not(v["x"]) == []
        exact, got = modulate_of(doubled(v), index, run=reference.modulate), modulate_of(v, index)
        assert got.dtype == dtype
        assert_within_budget(got, exact, plain_modulate(v, index), what=f"modulate {affine} {rows}",
                             floor=2 * torch.finfo(dtype).eps * max(1.0, float(exact.abs().max())))
        exact, got = gate_of(doubled(v), index, run=reference.gate), gate_of(v, index)
        assert got.dtype == dtype
        assert_within_budget(got, exact, plain_gate(v, index), what=f"gate {rows}")


def test_samples_share_rows():
    v = inputs(6, 4, 40, rows=2)
    index = INDEX[:6]
    wide = {k: t[index] if k in ("scale", "shift", "gate") else t for k, t in v.items()}
    assert torch.equal(modulate_of(v, index), modulate_of(wide)) and torch.equal(gate_of(v, index), gate_of(wide))
    one = {k: t[:1] if k in ("scale", "shift", "gate") else t for k, t in v.items()}
    assert torch.equal(modulate_of(one), modulate_of(v, torch.zeros(6, dtype=torch.int64)))
    assert torch.equal(gate_of(one), gate_of(v, torch.zeros(6, dtype=torch.int64)))


def test_offsets_beyond_2_31_elements():
    place, v = Far(), inputs(2, 3, 40)
    far = {**v, **{name: place.place(v[name]) for name in ("x", "residual")}}
    assert torch.equal(modulate_of(far), modulate_of(v)) and torch.equal(gate_of(far), gate_of(v))


def test_a_large_mean_costs_no_digits():
    v = inputs(2, 8, 512)
    v["x"] = v["x"] + 1000
    assert_within_budget(modulate_of(v), modulate_of(doubled(v), run=reference.modulate), plain_modulate(v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strides_margins_and_outliers(dtype):
    plain = inputs(3, 5, 70, dtype=dtype, affine=True)
    plain["x"], plain["residual"] = with_outliers(plain["x"], 1e3, 0.05), with_outliers(plain["residual"])
    index = torch.tensor([2, 0, 0])
    want, gated = modulate_of(plain, index), gate_of(plain, index)
    assert want.isfinite().all() and gated.isfinite().all()
    for change in (strided, poisoned):
        v, own = {k: change(t) for k, t in plain.items()}, change(index)
        assert torch.equal(modulate_of(v, own), want) and torch.equal(gate_of(v, own), gated)
    swapped = {k: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t for k, t in plain.items()}
    assert torch.equal(modulate_of(swapped, index), want) and torch.equal(gate_of(swapped, index), gated)
    chunks = torch.cat([plain["shift"], plain["scale"], plain["gate"]], 1).chunk(3, 1)  # read in place
    v = plain | dict(shift=chunks[0], scale=chunks[1], gate=chunks[2])
    assert torch.equal(modulate_of(v, index), want) and torch.equal(gate_of(v, index), gated)
    for b in range(3):  # a token does not see its batch
        alone = plain | {k: plain[k][b:b + 1, 2:] for k in ("x", "residual")}
        assert torch.equal(modulate_of(alone, index[b:b + 1]), want[b:b + 1, 2:])
        assert torch.equal(gate_of(alone, index[b:b + 1]), gated[b:b + 1, 2:])


def test_a_nan_stays_in_its_token():
    v = inputs(2, 4, 50)
    clean, gated = modulate_of(v), gate_of(v)
    v["x"][1, 2, 7] = float("nan")
    got, kept = modulate_of(v), gate_of(v)
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[1, 2] = True
    assert got[bad].isnan().all() and torch.equal(got[~bad], clean[~bad])
    assert int(kept.isnan().sum()) == 1 and torch.equal(kept[~bad], gated[~bad])
    flat = inputs(1, 3, 20)
    flat["x"][:] = 5.0  # variance zero: the shift alone
    assert torch.equal(modulate_of(flat), flat["shift"].expand(3, -1)[None])


def test_an_index_out_of_range_gives_nan():
    """Nothing is read there, and the other samples do not see it."""
    v = inputs(3, 4, 20, rows=2, affine=True)
    for bad in (2, -1, 2**40):
        index = torch.tensor([1, bad, 0])
        for run in (modulate_of, gate_of):
            got, want = run(v, index), run(v, torch.tensor([1, 0, 0]))
            assert got[1].isnan().all() and torch.equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (0, 0, 8)])
def test_empty(shape):
    v = inputs(*shape, rows=1)
    assert modulate_of(v).shape == shape and gate_of(v).shape == shape
