"""The backward where its tiles end: ragged lengths, head_dims and blocks around 16, 32, 64 and 128, margins."""

from __future__ import annotations

import pytest
import torch
from generators import heads_last, poisoned, strided, with_outliers
from sla_cases import SCOPES, problem
from tolerance import assert_relative, relative_norm

from triskele.ops import sparse_linear_attention

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def _gradients(q, k, v, block_map, upstream, block_q, block_k, backend="cpu", dtype=None, **kwargs):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v)]
    if dtype is not None:
        kwargs = {n: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for n, x in kwargs.items()}
    o = sparse_linear_attention(*leaves, block_map, block_q, block_k, backend=backend, **kwargs)
    return torch.autograd.grad(o, leaves, upstream.to(o.dtype))


def _check(q, k, v, block_map, block_q, block_k, tolerance=None, **kwargs):
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    got = _gradients(q, k, v, block_map, upstream, block_q, block_k, **kwargs)
    want = _gradients(q, k, v, block_map, upstream, block_q, block_k, "reference", torch.float64, **kwargs)
    for name, a, b in zip(("dq", "dk", "dv"), got, want):
        assert a.dtype == q.dtype
        assert_relative(a, b, tolerance or TOLERANCE[q.dtype], name)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 8, 16, 24, 32, 64, 72, 80, 128, 256])
def test_head_dims(dim, dtype):
    q, k, v, block_map, key_mask = problem((1, 2, 150, dim), 170, dtype, 128, 64, keep=0.7, mask=dim % 16 != 0)
    block_map[:, :, -1, 0] = 1
    weight = torch.randn(dim, dim, generator=torch.Generator().manual_seed(2)) / dim**0.5
    # d S / d q is all cancellation where a softmax over D has one entry, or the scores tell keys little apart
    _check(q, k, v, block_map, 128, 64, key_mask=key_mask, proj_weight=weight.to(dtype), feature_map="elu",
           tolerance=None if dim >= 16 else 4 * TOLERANCE[dtype])
    _check(q, k, v, block_map, 128, 64, key_mask=key_mask, tolerance=None if dim >= 16 else 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_q, block_k", [(16, 16), (31, 17), (33, 63), (64, 64), (65, 65), (100, 48), (128, 96),
                                              (129, 127), (200, 130), (3, 64), (128, 15)])
def test_blocks_and_lengths(block_q, block_k, dtype):
    for extra in (0, 1, 15, 17):
        q, k, v, block_map, _ = problem((1, 1, block_q + extra, 40), 2 * block_k + extra, dtype, block_q, block_k,
                                        keep=0.6, drop=0.0, seed=extra)
        block_map[:, :, -1, -1] = 1
        _check(q, k, v, block_map, block_q, block_k, scope="complement", proj_weight=torch.eye(40, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alpha_and_every_key_kept(dtype):
    q, k, v, block_map, _ = problem((2, 2, 300, 32), None, dtype, 64, 64)
    block_map.fill_(1)
    _check(q, k, v, block_map, 64, 64)
    _check(q, k, v, block_map, 64, 64, scope="marginal", alpha=torch.rand(2, 2, 300).to(dtype))
    _check(q, k, v, block_map, 64, 64, scale=-0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outliers(dtype):
    """Scores in the hundreds: nearly all P vanish, and what is rounded off a score is a large share of the rest. lse
    belongs to scores that were rounded the same way, so the error stays one of the scores'."""
    torch.manual_seed(3)
    q, k, v, block_map, _ = problem((1, 2, 200, 64), None, dtype, 128, 64, keep=0.6)
    q, k, v = with_outliers(q, 30.0), with_outliers(k, 30.0), with_outliers(v, 30.0)
    got = _check(q, k, v, block_map, 128, 64, tolerance=2e-4 if dtype == torch.float32 else 2e-2)
    assert all(x.isfinite().all() for x in got)
    far = torch.full_like(k, 0.0)
    far[:, :, ::2] = 40.0  # every other key is below exp's range for positive queries
    got = _gradients(q.abs(), far, v, torch.ones_like(block_map), torch.ones_like(q), 128, 64)
    assert all(x.isfinite().all() for x in got) and not got[2][:, :, 1::2].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 700, 64), (1, 3, 333, 24)], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_threads_give_the_same_bits(shape, scope, dtype):
    q, k, v, block_map, key_mask = problem(shape, None, dtype, 64, 32, mask=True)
    weight, upstream = torch.randn(shape[3], shape[3]).to(dtype), torch.randn(shape).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(_gradients(q, k, v, block_map, upstream, 64, 32, scope=scope, proj_weight=weight,
                                      key_mask=key_mask))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [poisoned, strided, heads_last])
def test_margins_are_not_read(layout, dtype):
    """NaN around every input; the same bits as without."""
    q, k, v, block_map, key_mask = problem((2, 2, 77, 72), 90, dtype, 32, 32, mask=True)
    upstream = torch.randn_like(q)
    weight = torch.randn(72, 72).to(dtype)
    want = _gradients(q, k, v, block_map, upstream, 32, 32, proj_weight=weight, key_mask=key_mask)
    hidden = ~key_mask[:, None, :, None]
    k, v = k.masked_fill(hidden, float("nan")), v.masked_fill(hidden, float("inf"))
    leaves = [layout(x).detach().requires_grad_() for x in (q, k, v)]
    o = sparse_linear_attention(*leaves, block_map, 32, 32, proj_weight=layout(weight[None, None])[0, 0],
                                key_mask=key_mask)
    got = torch.autograd.grad(o, leaves, layout(upstream))
    for a, b in zip(got, want):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_does_not_depend_on_its_neighbours(dtype):
    """Heads are cut into parts by their number; each stays within rounding of what it is alone."""
    q, k, v, block_map, _ = problem((1, 12, 260, 16), None, dtype, 32, 32)
    upstream = torch.randn_like(q)
    together = _gradients(q, k, v, block_map, upstream, 32, 32)
    alone = _gradients(*(x[:, 5:6] for x in (q, k, v, block_map, upstream)), 32, 32)
    for a, b in zip(together, alone):
        assert relative_norm(a[:, 5:6], b) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_the_native_op_takes_rows_of_either_dtype_and_refuses_others():
    q, k, v, block_map, _ = problem((1, 2, 70, 16))
    block_map.fill_(1)
    o, lse = torch.randn_like(q), torch.randn(1, 2, 70)
    native = torch.ops.triskele_native.sla_backward
    rest = (None, 64, 32, 0, 0, 0.25)
    grad = torch.randn_like(q).bfloat16()
    want = native(q, k, v, block_map, o, lse, grad.float(), grad.float(), lse, *rest)
    for a, b in zip(native(q, k, v, block_map, o, lse, grad, grad, lse, *rest), want):
        assert torch.equal(a, b)
    for bad in ((o[:, :1], lse, grad, None, None), (o, lse[:, :1], grad, None, None),
                (o, lse, grad[..., :8], None, None), (o, lse, grad, grad[:, :, 1:], None),
                (o, lse, grad.half(), None, None), (o, lse.double(), grad, None, None),
                (o, lse, grad, None, lse.double())):
        with pytest.raises(RuntimeError, match="sla_backward: "):
            native(q, k, v, block_map, *bad, *rest)
