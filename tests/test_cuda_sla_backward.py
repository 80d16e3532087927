"""csrc/cuda/sla_backward_sm90.cu, run thread by thread on the CPU: the float64 reference and published gradients."""

from __future__ import annotations

import math

import emulated
import pytest
import torch
from conftest import Vectors, vector_files
from generators import heads_last, poisoned, strided
from sla_cases import FEATURES, SCOPES, Published, at_precision, problem
from tolerance import assert_relative, assert_within_budget

from triskele import backend
from triskele.ops import sparse_linear_attention
from triskele.ops.sla import cuda_backward_backend, reference
from triskele.ops.sla.op import _fitting
from triskele.ops.sla.reference import Settings

ENTRY = {e.name: e for e in backend.TABLES["sla.backward"]}["cuda"]
VECTORS = [p for p in vector_files("attention", "sla_main_*") if "_q128k64_" in p.stem and "d128" in p.stem]


def backward(*inputs):
    """As the table's entry calls it."""
    assert ENTRY.why_not(*inputs) == []
    return emulated.load("sla_backward_sm90").sla_backward(*cuda_backward_backend.prepared(*inputs))


def case(shape, lk=None, dtype=torch.bfloat16, feature="softmax", scope="all", mask=False, linear=True, keep=0.5):
    """The arguments of an entry of sla.backward, with upstream gradients of every part."""
    q, k, v, block_map, key_mask = problem(shape, lk, dtype, 128, 64, keep=keep, mask=mask)
    settings = Settings(_fitting(128, q), _fitting(64, k), feature, scope, shape[3] ** -0.5)
    _, o_sparse, o_linear, lse = at_precision(torch.float64, q, k, v, block_map, settings, key_mask=key_mask)
    d_sparse, d_linear, d_lse = torch.randn(shape), torch.randn(shape), torch.randn(shape[:3])
    return [q, k, v, block_map, o_sparse.to(dtype), o_linear.to(dtype), lse.float(), d_sparse.to(dtype).float(),
            d_linear if linear else None, d_lse, key_mask, settings]


def exact(inputs):
    return reference.backward(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                                for x in inputs))


def check(inputs, what=""):
    dtype = inputs[0].dtype
    got = backward(*inputs)
    for name, a, b in zip(("dq", "dk", "dv"), got, exact(inputs)):
        assert a.dtype == dtype and a.shape == b.shape
        assert_relative(a, b, {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype], f"{name} {what}")
    return got


@pytest.mark.parametrize("shape, lk, mask, dtype", [
    ((1, 2, 200, 64), 150, False, torch.bfloat16),     # ragged last blocks, cross lengths
    ((1, 2, 200, 64), 150, False, torch.float16),
    ((2, 1, 130, 128), None, True, torch.float16),     # hidden keys, a block of them
    ((1, 1, 300, 72), 64, False, torch.bfloat16),      # padded head_dim, a single block of keys
    ((1, 1, 20, 8), 9, False, torch.bfloat16),
    ((1, 1, 20, 8), 9, False, torch.float16),
], ids=str)
def test_against_the_float64_reference(shape, lk, mask, dtype):
    for feature, scope in zip(FEATURES, SCOPES if shape[1] == 2 else ("marginal",)):
        check(case(shape, lk, dtype, feature, scope, mask), f"{feature} {scope}")


@pytest.mark.parametrize("dtype, scope", [(torch.bfloat16, "all"), (torch.float16, "complement")], ids=str)
def test_error_budget_through_the_public_op(dtype, scope, monkeypatch):
    """With a projection and with alpha, through autograd, at twice the error of the same precision in torch."""
    entries = backend.TABLES["sla.backward"]
    instead = backend.Backend("cpu", lambda *inputs: backward(*inputs))
    monkeypatch.setitem(backend.TABLES, "sla.backward", (instead, entries[-1]))
    forward = {e.name: e for e in backend.TABLES["sla.forward"]}["reference"]
    monkeypatch.setitem(backend.TABLES, "sla.forward", (backend.Backend("cpu", forward.run),))
    shape, dim = (1, 2, 150, 64), 64
    q, k, v, block_map, key_mask = problem(shape, 200, dtype, 128, 64, keep=0.5, mask=True)
    weight, bias = (torch.randn(dim, dim) / 8).to(dtype), torch.randn(dim).to(dtype)
    alpha, upstream = torch.rand(shape[:3]).to(dtype), torch.randn(shape).to(dtype)
    settings = Settings(128, 64, "elu", scope, dim ** -0.5)
    for names, extra in ((("weight", "bias"), (weight, bias)), (("alpha",), (alpha,))):
        def attend(compute, *leaves, names=names):
            named = dict(zip(names, leaves[3:]))
            return at_precision(compute, *leaves[:3], block_map, settings, key_mask=key_mask, **named)[0]

        def gradients(run, leaves):
            leaves = [x.detach().clone().requires_grad_() for x in leaves]
            out = run(*leaves)
            return torch.autograd.grad(out, leaves[:3], upstream.to(out.dtype))

        leaves = (q, k, v, *extra)
        truth = gradients(lambda *x: attend(torch.float64, *x), [x.double() for x in leaves])
        rough = gradients(lambda *x: attend(dtype, *x), leaves)
        named = ("proj_weight", "proj_bias") if len(extra) == 2 else ("alpha",)
        got = gradients(lambda q, k, v, *x: sparse_linear_attention(
            q, k, v, block_map, 128, 64, "elu", scope, key_mask=key_mask, backend="cpu",
            **dict(zip(named, x))), leaves)  # noqa: B023
        for name, a, t, r in zip(("dq", "dk", "dv"), got, truth, rough):
            assert_within_budget(a, t, r, what=f"{name} {names}",
                                 floor=2 * torch.finfo(dtype).eps * float(t.abs().max()))


def test_layouts_and_any_order():
    inputs = case((2, 2, 140, 64), 70, linear=True)
    want = check(inputs)
    for layout in (strided, heads_last, poisoned):
        changed = [layout(x) if i in (0, 1, 2, 4, 7, 8) else x for i, x in enumerate(inputs)]
        assert all(torch.equal(a, b) for a, b in zip(backward(*changed), want)), layout
    for name in ("backward", "random"):
        with emulated.order(name, 7):
            assert all(torch.equal(a, b) for a, b in zip(backward(*inputs), want)), name


def test_long_rows_reuse_every_stage():
    """More blocks in a row and in a column than any ring has stages; more than one run of the linear branch."""
    check(case((1, 1, 1100, 16), 520, keep=0.8))


def test_more_blocks_than_a_tile_of_the_cover():
    check(case((1, 1, 150, 8), 64 * 129 + 3, torch.float16, "softmax", "complement", keep=0.1))


def test_hidden_keys_may_hold_anything_and_get_zero():
    inputs = case((1, 2, 130, 64), 200, mask=True)
    hidden = ~inputs[10][:, None, :, None].expand_as(inputs[1])
    want = backward(*inputs)
    inputs[1], inputs[2] = (x.masked_fill(hidden, math.nan) for x in inputs[1:3])
    got = backward(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert all((x[hidden] == 0).all() for x in got[1:])


def test_rows_and_columns_without_critical_blocks():
    inputs = case((1, 1, 300, 64), 200, linear=False)
    inputs[3][:, :, 1], inputs[3][..., 2] = 0, -1
    q, k, v, block_map = inputs[:4]
    _, o_sparse, _, lse = at_precision(torch.float64, q, k, v, block_map, inputs[-1])
    inputs[4], inputs[6] = o_sparse.bfloat16(), lse.float()
    dq, dk, dv = check(inputs)
    assert not dq[:, :, 128:256].any() and not dk[:, :, 128:192].any() and not dv[:, :, 128:192].any()


def test_large_sums_stay_in_the_range_of_float16():
    """elu with a large mean: H is above 65504, phi(q) / n below float16's smallest."""
    inputs = case((1, 1, 128, 64), 640, torch.float16, "elu")
    inputs[0], inputs[1], inputs[2] = inputs[0] + 12, inputs[1] + 12, inputs[2] + 20
    q, k, v, block_map = inputs[:4]
    _, o_sparse, _, lse = at_precision(torch.float64, q, k, v, block_map, inputs[-1])
    inputs[4], inputs[6], inputs[7], inputs[9] = o_sparse.half(), lse.float(), torch.zeros_like(inputs[7]), None
    got, want = backward(*inputs), exact(inputs)
    assert all(x.isfinite().all() for x in got)
    assert_relative(got[2], want[2], 2e-3, "dv")


@pytest.mark.parametrize("lq, lk", [(0, 8), (8, 0)])
def test_empty(lq, lk):
    q, k = torch.zeros(1, 2, lq, 8).half(), torch.zeros(1, 2, lk, 8).half()
    block_map = torch.zeros(1, 2, -(-lq // 128), -(-lk // 64), dtype=torch.int8)
    got = backward(q, k, k, block_map, q, None, torch.zeros(1, 2, lq), q.float(), None, None, None,
                   Settings(_fitting(128, q), _fitting(64, k), "softmax", "all", 1.0))
    assert [x.shape for x in got] == [q.shape, k.shape, k.shape] and not any(x.any() for x in got)


@pytest.mark.parametrize("path", VECTORS[:1], ids=lambda p: p.stem)
def test_published_gradients(path, monkeypatch):
    published = Published(Vectors(path), torch.bfloat16)
    instead = backend.Backend("cpu", lambda *inputs: backward(*inputs))
    monkeypatch.setitem(backend.TABLES, "sla.backward", (instead,))
    leaves = [published.q, published.k, published.v]
    for x in leaves:
        x.requires_grad_()
    grads = torch.autograd.grad(published.attend("cpu"), leaves, published.do)
    for name, grad in zip(("dq", "dk", "dv"), grads):
        assert_relative(grad[:, :, published.rows], published.vectors[name], 3e-2, name)


def test_the_entry_says_why_not():
    inputs = case((1, 1, 200, 64), 100)
    assert backend.explain("sla.backward", *inputs).reasons["cuda"] == ["takes cuda tensors, got cpu"]
    wide = torch.zeros(1, 1, 200, 136)
    assert ENTRY.why_not(wide, wide, wide, *inputs[3:-1], Settings(64, 32, "elu", "all", 1.0)) == [
        "takes float16 and bfloat16, got torch.float32", "takes head_dim D <= 128 in multiples of 8, got 136",
        "takes block_q 128, or a single block, got 64", "takes block_k 64, or a single block, got 32"]


def test_the_native_op_guards_itself():
    ops = emulated.load("sla_backward_sm90")
    good = list(cuda_backward_backend.prepared(*case((1, 1, 200, 64), 100)))
    for at, value, message in ((0, good[0].float(), "float16 or bfloat16"),
                               (1, good[1].half(), "k of the dtype of q"),
                               (0, strided(good[0]), "q in rows of 16-byte steps"), (10, 64, "block_q of 128"),
                               (3, good[3][..., :1].contiguous(), "map elements"),
                               (5, good[5].half(), "lse in float32"),
                               (7, good[7].bfloat16(), "d_linear in float32")):
        with pytest.raises(RuntimeError, match=message):
            ops.sla_backward(*good[:at], value, *good[at + 1:])
