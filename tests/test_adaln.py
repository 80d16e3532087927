"""Layer norm with modulation, and the gated residual: kernels against the float64 reference and against torch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from generators import heads_last, poisoned, strided, with_outliers
from tolerance import assert_within_budget

import triskele as tk
from triskele import backend
from triskele.ops import adaln_modulate, gate_residual

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1, 1), (2, 3, 7), (3, 5, 16), (2, 9, 33), (4, 2, 384), (1, 6, 1153)]
INDEX = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0])


def inputs(batch, tokens, channels, *, rows=None, dtype=torch.float32, table=torch.float32, affine=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g).to(dtype)
    rows = batch if rows is None else rows
    return dict(x=3 * normal(batch, tokens, channels) + 1, residual=normal(batch, tokens, channels),
                scale=normal(rows, channels, dtype=table), shift=normal(rows, channels, dtype=table),
                gate=normal(rows, channels, dtype=table),
                weight=1 + normal(channels, dtype=table) if affine else None,
                bias=normal(channels, dtype=table) if affine else None)


def modulate_of(v, index=None, backend="auto", eps=1e-6):
    return adaln_modulate(v["x"], v["scale"], v["shift"], index, v["weight"], v["bias"], eps, backend)


def gate_of(v, index=None, backend="auto"):
    return gate_residual(v["residual"], v["x"], v["gate"], index, backend)


def doubled(v):
    return {k: None if t is None else t.double() for k, t in v.items()}


def plain_modulate(v, index=None, eps=1e-6):
    """As diffusers writes it, in the dtype of its inputs."""
    c = v["x"].shape[2]
    batch = len(v["x"])
    scale, shift = ((v[k].expand(batch, -1) if index is None else v[k][index])[:, None] for k in ("scale", "shift"))
    weight, bias = (None if v[k] is None else v[k].to(v["x"].dtype) for k in ("weight", "bias"))
    return (F.layer_norm(v["x"], (c,), weight, bias, eps) * (1 + scale) + shift).to(v["x"].dtype)


def plain_gate(v, index=None):
    gate = (v["gate"].expand(len(v["x"]), -1) if index is None else v["gate"][index])[:, None]
    return (v["residual"] + gate * v["x"]).to(v["x"].dtype)


@pytest.mark.parametrize("table", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_within_budget(shape, dtype, table):
    for affine, rows in itertools.product((False, True), (None, 1, 2)):
        v = inputs(*shape, rows=rows, dtype=dtype, table=table, affine=affine)
        index = INDEX[:shape[0]] if rows == 2 else None
        exact, plain = modulate_of(doubled(v), index, "reference"), plain_modulate(v, index)
        got = modulate_of(v, index, "cpu")
        assert got.dtype == dtype
        assert_within_budget(got, exact, plain, what=f"modulate {affine} {rows}",
                             floor=2 * torch.finfo(dtype).eps * max(1.0, float(exact.abs().max())))
        exact = gate_of(doubled(v), index, "reference")
        assert_within_budget(gate_of(v, index, "cpu"), exact, plain_gate(v, index), what=f"gate {rows}")


def test_reference_is_torchs_layer_norm():
    v = doubled(inputs(4, 5, 24, rows=2, affine=True))
    index = INDEX[:4]
    for eps in (1e-6, 0.3):
        assert torch.allclose(modulate_of(v, index, "reference", eps), plain_modulate(v, index, eps), atol=1e-13)
    assert torch.equal(gate_of(v, index, "reference"), plain_gate(v, index))


def test_samples_share_rows():
    """A row index gives what the repeated rows give."""
    v = inputs(6, 4, 40, rows=2)
    index = INDEX[:6]
    wide = {k: t[index] if k in ("scale", "shift", "gate") else t for k, t in v.items()}
    assert torch.equal(modulate_of(v, index), modulate_of(wide))
    assert torch.equal(gate_of(v, index), gate_of(wide))
    one = {k: t[:1] if k in ("scale", "shift", "gate") else t for k, t in v.items()}
    assert torch.equal(modulate_of(one), modulate_of(v, torch.zeros(6, dtype=torch.int64)))


def test_a_large_mean_costs_no_digits():
    """Var as E[x²] - mean² would be noise here."""
    v = inputs(2, 8, 512)
    v["x"] = v["x"] + 1000
    exact = modulate_of(doubled(v), None, "reference")
    assert_within_budget(modulate_of(v), exact, plain_modulate(v))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_margins_and_outliers(dtype):
    plain = inputs(3, 5, 70, dtype=dtype, affine=True)
    plain["x"], plain["residual"] = with_outliers(plain["x"], 1e3, 0.05), with_outliers(plain["residual"])
    index = torch.tensor([2, 0, 0])
    want, gated = modulate_of(plain, index), gate_of(plain, index)
    assert want.isfinite().all() and gated.isfinite().all()
    for change in (strided, poisoned):
        v = {k: change(t) for k, t in plain.items()}
        own = change(index)
        kept = {k: t.clone() for k, t in v.items()}
        assert torch.equal(modulate_of(v, own), want) and torch.equal(gate_of(v, own), gated)
        assert all(torch.equal(v[k], kept[k]) for k in v)
    swapped = {k: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t for k, t in plain.items()}
    assert torch.equal(modulate_of(swapped, index), want) and torch.equal(gate_of(swapped, index), gated)
    chunks = torch.cat([plain["shift"], plain["scale"], plain["gate"]], 1).chunk(3, 1)    # read in place
    v = plain | dict(shift=chunks[0], scale=chunks[1], gate=chunks[2])
    assert torch.equal(modulate_of(v, index), want) and torch.equal(gate_of(v, index), gated)
    heads = heads_last(torch.randn(2, 3, 5, 8).to(dtype))[:, :, :, 0]                     # no unit stride at all
    table = torch.randn(2, 5)
    assert torch.equal(adaln_modulate(heads, table, table), adaln_modulate(heads.contiguous(), table, table))


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
    flat["x"][:] = 5.0                                          # variance zero: the shift alone
    assert torch.equal(modulate_of(flat), flat["shift"].expand(3, -1)[None])


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan():
    ones = torch.ones(1, 64, dtype=torch.bfloat16)
    values = torch.randint(0, 2**16, (1, 999, 64), dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    small = torch.randn(1, 999, 64).to(torch.bfloat16)
    got = gate_residual(values, small, ones)
    want = (values.float() + small.float()).to(torch.bfloat16)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (0, 0, 8)])
def test_empty(shape):
    v = inputs(*shape, affine=True)
    assert modulate_of(v).shape == shape and gate_of(v).shape == shape
    index = torch.zeros(shape[0], dtype=torch.int64)
    one = inputs(*shape, rows=1)
    assert modulate_of(one, index).shape == shape and gate_of(one, index).shape == shape
    x = v["x"].requires_grad_()
    modulate_of(v | dict(x=x)).sum().backward()
    assert x.grad.shape == shape


def test_bitwise_the_same_on_any_number_of_threads():
    v = inputs(5, 700, 200, rows=2, dtype=torch.bfloat16)
    index, threads, seen = INDEX[:5], torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append((modulate_of(v, index), gate_of(v, index)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other))


@pytest.mark.parametrize("index", [None, INDEX[:3]])
@pytest.mark.parametrize("affine", [False, True])
def test_gradients(index, affine):
    v = {k: None if t is None else t.requires_grad_()
         for k, t in doubled(inputs(3, 4, 6, rows=3 if index is None else 2, affine=affine)).items()}
    names = ["x", "scale", "shift", *(["weight", "bias"] if affine else [])]

    def modulate(*values):
        return modulate_of(v | dict(zip(names, values)), index, "reference")

    def gate(*values):
        return gate_of(v | dict(zip(("residual", "x", "gate"), values)), index, "reference")
    assert torch.autograd.gradcheck(modulate, [v[k] for k in names])
    assert torch.autograd.gradcheck(gate, [v[k] for k in ("residual", "x", "gate")])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_through_the_kernel(dtype):
    v = inputs(3, 4, 20, rows=1, dtype=dtype, table=torch.float32, affine=True)
    up = torch.randn(3, 4, 20)

    def gradients(values, op, names):
        leaves = {k: values[k].detach().clone().requires_grad_() for k in names}
        out = op(values | leaves)
        return torch.autograd.grad(out, list(leaves.values()), up.to(out.dtype))
    for op, names in ((modulate_of, ("x", "scale", "shift", "weight", "bias")), (gate_of, ("residual", "x", "gate"))):
        got = gradients(v, op, names)
        want = gradients(doubled(v), lambda values, op=op: op(values, None, "reference"), names)
        for name, g, w in zip(names, got, want):
            assert g.dtype == v[name].dtype and g.shape == v[name].shape
            assert (g - w).abs().max() <= 4 * torch.finfo(dtype).eps * max(1.0, float(w.abs().max())), name


@pytest.mark.parametrize("wanted", ["cpu", "reference"])
def test_opcheck(wanted):
    v = inputs(3, 4, 20, rows=2, affine=True)
    x = v["x"].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    index = INDEX[:3]
    modulate = (x, v["scale"].requires_grad_(), v["shift"], index, v["weight"].requires_grad_(), v["bias"], 1e-6)
    ops = torch.ops.triskele
    torch.library.opcheck(ops.adaln_modulate, (*modulate, wanted))
    torch.library.opcheck(ops.adaln_modulate, (*modulate[:4], None, None, 1e-6, wanted))
    gate = (v["residual"].requires_grad_(), x, v["gate"].requires_grad_(), index)
    torch.library.opcheck(ops.gate_residual, (*gate, wanted))
    grad = torch.randn(3, 4, 20)
    plain = [t.detach() for t in (grad, x, v["scale"])]
    torch.library.opcheck(ops.adaln_modulate_backward, (*plain, index, v["weight"].detach(), None, 1e-6))
    torch.library.opcheck(ops.gate_residual_backward, (*plain[:2], v["gate"].detach(), index))


def test_compiles_without_a_graph_break():
    v = inputs(3, 4, 20, rows=2)

    def block(x, residual):
        y = adaln_modulate(x, v["scale"], v["shift"], INDEX[:3])
        return gate_residual(residual, y, v["gate"], INDEX[:3])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = v["x"].requires_grad_()
    got, want = compiled(x, v["residual"]), block(x, v["residual"])
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)))


def test_auto_takes_the_kernel_and_says_what_it_refuses():
    v = inputs(2, 3, 8)
    arguments = (v["x"], v["scale"], v["shift"], None, None, None, 1e-6)
    assert backend.explain("adaln.modulate", *arguments).chosen == "cpu"
    assert backend.explain("adaln.gate", v["residual"], v["x"], v["gate"], None).chosen == "cpu"
    half = backend.explain("adaln.modulate", v["x"].half(), *arguments[1:])
    assert half.chosen is None and "takes float32 and bfloat16, got torch.float16" in half.reasons["cpu"][0]
    assert {row.op for row in tk.backends()} >= {"adaln.modulate", "adaln.gate", "adaln.modulate_backward"}


@pytest.mark.parametrize("change,match", [
    (dict(x=torch.zeros(3, 8)), "x: expected 3 dimensions"),
    (dict(x=torch.zeros(3, 4, 8).long()), "x: expected a floating-point dtype"),
    (dict(x=torch.zeros(3, 4, 0)), "x: expected at least one channel"),
    (dict(x=None), "x: expected a tensor, got NoneType"),
    (dict(scale=torch.zeros(3, 9)), r"scale: expected shape \[any, 8\]"),
    (dict(scale=torch.zeros(8)), r"scale: expected shape \[any, 8\]"),
    (dict(scale=torch.zeros(3, 8).long()), "scale: expected a floating-point dtype"),
    (dict(shift=torch.zeros(2, 8)), r"shift: expected shape \[3, 8\], got \[2, 8\]"),
    (dict(scale=torch.zeros(2, 8), shift=torch.zeros(2, 8)), "scale: expected 3 rows, one a sample, or 1"),
    (dict(weight=torch.zeros(9)), r"weight: expected shape \[8\]"),
    (dict(bias=torch.zeros(8).long()), "bias: expected a floating-point dtype"),
    (dict(row_index=torch.zeros(2).long()), r"row_index: expected shape \[3\]"),
    (dict(row_index=torch.zeros(3).int()), "row_index: expected int64, got torch.int32"),
    (dict(row_index=[0, 1, 2]), "row_index: expected a tensor, got list"),
    (dict(row_index=torch.tensor([0, 3, 1])), r"row_index: expected values in \[0, 3\), got 0 to 3"),
    (dict(row_index=torch.tensor([0, -1, 1])), r"row_index: expected values in \[0, 3\), got -1 to 1"),
    (dict(eps=-1e-6), "eps: expected a number >= 0"),
    (dict(eps=float("nan")), "eps: expected a number >= 0"),
    (dict(eps="1e-6"), "eps: expected a number >= 0"),
    (dict(backend="gpu"), "backend: expected one of"),
    (dict(scale=torch.zeros(3, 8, device="meta")), "scale: expected the device of x"),
])
def test_bad_modulate_arguments(change, match):
    v = inputs(3, 4, 8)
    arguments = {k: v[k] for k in ("x", "scale", "shift", "weight", "bias")} | change
    with pytest.raises(ValueError, match=match):
        adaln_modulate(**arguments)


@pytest.mark.parametrize("change,match", [
    (dict(residual=torch.zeros(3, 8)), "residual: expected 3 dimensions"),
    (dict(x=torch.zeros(3, 5, 8)), r"x: expected shape \[3, 4, 8\], got \[3, 5, 8\]"),
    (dict(x=torch.zeros(3, 4, 8).double()), "x: expected the dtype of residual"),
    (dict(gate=torch.zeros(2, 8)), "gate: expected 3 rows, one a sample, or 1"),
    (dict(gate=torch.zeros(3, 1)), r"gate: expected shape \[any, 8\]"),
    (dict(row_index=torch.tensor([0, 0, 9])), r"row_index: expected values in \[0, 3\), got 0 to 9"),
    (dict(backend="fast"), "backend: expected one of"),
])
def test_bad_gate_arguments(change, match):
    v = inputs(3, 4, 8)
    arguments = {k: v[k] for k in ("residual", "x", "gate")} | change
    with pytest.raises(ValueError, match=match):
        gate_residual(**arguments)


def test_the_native_ops_guard_themselves():
    v, native = inputs(3, 4, 8), torch.ops.triskele_native
    with pytest.raises(RuntimeError, match="row_index from 0 to 2"):
        native.adaln_gate(v["residual"], v["x"], v["gate"], torch.tensor([0, 1, 3]))
    with pytest.raises(RuntimeError, match="a row for each sample, or one"):
        native.adaln_modulate(v["x"], v["scale"][:2], v["shift"][:2], None, None, None, 1e-6)
    with pytest.raises(RuntimeError, match="scale in float32"):
        native.adaln_modulate(v["x"], v["scale"].double(), v["shift"], None, None, None, 1e-6)
    with pytest.raises(RuntimeError, match="unit channel stride"):
        native.adaln_modulate(strided(v["x"]), v["scale"], v["shift"], None, None, None, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_that_go_past_the_caches(dtype):
    """A result of more than 4 MiB is stored otherwise; its values are those of its parts, which are not."""
    v = inputs(2, 720, 1536, rows=2, dtype=dtype)
    for run in (modulate_of, gate_of):
        whole = run(v)
        assert whole.numel() * whole.element_size() >= 4 << 20
        parts = [run(v | {name: v[name][:, at:at + 90] for name in ("x", "residual")}) for at in range(0, 720, 90)]
        assert torch.equal(whole, torch.cat(parts, 1))
